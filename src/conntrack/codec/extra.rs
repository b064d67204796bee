//! The attributes of what only few connections have, both ways.
//!
//! An attribute that has not the shape known here yields an error, which costs the message that
//! attribute only.

use super::attribute::{Attributes, Malformed, be32, field};
use super::number::*;
use super::writer::RequestWriter;
use crate::conn::extra::{Extra, HELPER_NAME, SeqAdj, Synproxy, parts};
use crate::conn::tuple::{DCCP, SCTP};

/// Takes one attribute of a message into `extra`; others than those of an [`Extra`] change nothing.
/// PROTOINFO, which depends on the protocol, is read with the tuples.
pub(super) fn decode_extra(kind: u16, payload: &[u8], extra: &mut Extra) -> Result<(), Malformed> {
    match kind {
        LABELS => {
            extra.labels = field(payload)?;
            extra.parts |= parts::LABELS;
        }
        // The kernel writes both directions or none.
        SEQ_ADJ_ORIGINAL | SEQ_ADJ_REPLY => {
            let [correction_position, offset_before, offset_after] = words(payload)?;
            extra.seqadj[(kind == SEQ_ADJ_REPLY) as usize] =
                SeqAdj { correction_position, offset_before, offset_after };
            extra.parts |= parts::SEQADJ;
        }
        HELP => {
            if let Some(name) = find(payload, HELP_NAME)? {
                extra.helper = padded(name).ok_or(Malformed::FieldSize)?;
                extra.parts |= parts::HELPER;
            }
        }
        SYNPROXY => {
            // Every entry that was written by ctnetlink has this, zero unless a proxy is at work.
            let [isn, its, tsoff] = words(payload)?;
            if [isn, its, tsoff] != [0; 3] {
                extra.synproxy = Synproxy { isn, its, tsoff };
                extra.parts |= parts::SYNPROXY;
            }
        }
        _ => {}
    }
    Ok(())
}

/// The numbers of an attribute that holds N of 32 bits, all of them, with types counted from 1.
fn words<const N: usize>(payload: &[u8]) -> Result<[u32; N], Malformed> {
    let mut words = [None; N];
    for attribute in Attributes::new(payload) {
        let (kind, payload) = attribute?;
        if let Some(word) = (kind as usize).checked_sub(1).and_then(|i| words.get_mut(i)) {
            *word = Some(be32(payload)?);
        }
    }
    let mut all = [0; N];
    for (to, from) in all.iter_mut().zip(words) {
        *to = from.ok_or(Malformed::FieldSize)?;
    }
    Ok(all)
}

/// The attribute of one kind among those in `payload`.
pub(super) fn find(payload: &[u8], kind: u16) -> Result<Option<&[u8]>, Malformed> {
    let mut found = None;
    for attribute in Attributes::new(payload) {
        let (of_kind, payload) = attribute?;
        if of_kind == kind {
            found = Some(payload);
        }
    }
    Ok(found)
}

/// A helper's name with zeros behind it, if it is one: the kernel loads modules by it, so it has to
/// be short, visible text.
fn padded(name: &[u8]) -> Option<[u8; HELPER_NAME]> {
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    if end == 0 || end >= HELPER_NAME || !name[..end].iter().all(u8::is_ascii_graphic) {
        return None;
    }
    let mut padded = [0; HELPER_NAME];
    padded[..end].copy_from_slice(&name[..end]);
    Some(padded)
}

impl RequestWriter<'_> {
    /// What a new entry gets. Labels of zero are what it has anyway.
    pub(super) fn extra_of_new(&mut self, extra: &Extra, protocol: u8) {
        self.helper(extra);
        if extra.has(parts::LABELS) && extra.labels != [0; 16] {
            self.field(LABELS, &extra.labels);
        }
        self.shifts_and_state(extra, protocol);
    }

    /// What an entry that is there is to have. Its helper the kernel only compares: where there is
    /// none it answers EOPNOTSUPP, where there is another one EBUSY, before it changes anything.
    /// Labels come last: where the entry has no room for any it answers ENOSPC, and has changed all
    /// the rest.
    pub(super) fn extra_of_present(&mut self, extra: &Extra, protocol: u8) {
        self.helper(extra);
        if extra.has(parts::LABELS) {
            self.field(LABELS, &extra.labels);
            self.field(LABELS_MASK, &[0xff; 16]);
        }
        self.shifts_and_state(extra, protocol);
    }

    fn helper(&mut self, extra: &Extra) {
        if let Some(name) = padded(&extra.helper).filter(|_| extra.has(parts::HELPER)) {
            let end = name.iter().position(|b| *b == 0).unwrap_or(HELPER_NAME - 1);
            self.nest(HELP, |w| w.field(HELP_NAME, &name[..=end]));
        }
    }

    fn shifts_and_state(&mut self, extra: &Extra, protocol: u8) {
        if extra.has(parts::SEQADJ) {
            for (kind, shift) in [SEQ_ADJ_ORIGINAL, SEQ_ADJ_REPLY].into_iter().zip(&extra.seqadj) {
                self.words(
                    kind,
                    [shift.correction_position, shift.offset_before, shift.offset_after],
                );
            }
        }
        if extra.has(parts::SYNPROXY) {
            self.words(SYNPROXY, [extra.synproxy.isn, extra.synproxy.its, extra.synproxy.tsoff]);
        }
        if extra.has(parts::PROTOINFO) {
            let info = &extra.protoinfo;
            let [original, reply] = [(info.value >> 32) as u32, info.value as u32];
            match protocol {
                SCTP => self.nest(PROTOINFO, |w| {
                    w.nest(PROTOINFO_SCTP, |w| {
                        w.field(SCTP_STATE, &[info.state]);
                        w.field(SCTP_VTAG_ORIGINAL, &original.to_be_bytes());
                        w.field(SCTP_VTAG_REPLY, &reply.to_be_bytes());
                    })
                }),
                DCCP => self.nest(PROTOINFO, |w| {
                    w.nest(PROTOINFO_DCCP, |w| {
                        w.field(DCCP_STATE, &[info.state]);
                        w.field(DCCP_ROLE, &[info.role]);
                        w.field(DCCP_HANDSHAKE_SEQ, &info.value.to_be_bytes());
                    })
                }),
                _ => {}
            }
        }
    }

    fn words<const N: usize>(&mut self, kind: u16, words: [u32; N]) {
        self.nest(kind, |w| {
            for (number, word) in words.iter().enumerate() {
                w.field(number as u16 + 1, &word.to_be_bytes());
            }
        });
    }
}
