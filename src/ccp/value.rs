//! What messages carry of a connection: stamps, tuples, state, and what only few have.

use super::Reject;
use super::bytes::{Reader, Writer};
use crate::conn::extra::{HELPER_NAME, ProtoInfo, SeqAdj, Synproxy, parts};
use crate::conn::slot::groups;
use crate::conn::{Connection, Extra, Family, Stamp, State, Tuple};

/// Bytes of the largest [`Extra`].
pub const EXTRA_MAX: usize = 1 + 16 + 24 + HELPER_NAME + 12 + 10;

pub(super) fn put_stamp(w: &mut Writer<'_>, stamp: Stamp) {
    w.varint(stamp.epoch);
    w.varint(stamp.version);
}

pub(super) fn get_stamp(r: &mut Reader<'_>) -> Result<Stamp, Reject> {
    Ok(Stamp { epoch: r.varint()?, version: r.varint()? })
}

pub(super) fn put_state(w: &mut Writer<'_>, mask: u8, s: &State) {
    if mask & groups::STATE != 0 {
        w.u32(s.status);
        w.put(&[s.tcp_state, s.tcp_scale, s.tcp_flags_original, s.tcp_flags_reply]);
    }
    if mask & groups::TIMEOUT != 0 {
        w.u32(s.timeout_s);
    }
    if mask & groups::MARK != 0 {
        w.u32(s.mark);
    }
}

pub(super) fn get_state(r: &mut Reader<'_>, mask: u8) -> Result<State, Reject> {
    let mut s = State::default();
    if mask & groups::STATE != 0 {
        s.status = r.u32()?;
        [s.tcp_state, s.tcp_scale, s.tcp_flags_original, s.tcp_flags_reply] = r.array()?;
    }
    if mask & groups::TIMEOUT != 0 {
        s.timeout_s = r.u32()?;
    }
    if mask & groups::MARK != 0 {
        s.mark = r.u32()?;
    }
    Ok(s)
}

/// Which parts are there, then each of them; nothing is left out of a part.
pub(super) fn put_extra(w: &mut Writer<'_>, x: &Extra) {
    w.u8(x.parts);
    if x.has(parts::LABELS) {
        w.put(&x.labels);
    }
    if x.has(parts::SEQADJ) {
        for direction in &x.seqadj {
            w.u32(direction.correction_position);
            w.u32(direction.offset_before);
            w.u32(direction.offset_after);
        }
    }
    if x.has(parts::HELPER) {
        w.put(&x.helper);
    }
    if x.has(parts::SYNPROXY) {
        w.u32(x.synproxy.isn);
        w.u32(x.synproxy.its);
        w.u32(x.synproxy.tsoff);
    }
    if x.has(parts::PROTOINFO) {
        w.u8(x.protoinfo.state);
        w.u8(x.protoinfo.role);
        w.u64(x.protoinfo.value);
    }
}

pub(super) fn get_extra(r: &mut Reader<'_>) -> Result<Extra, Reject> {
    let mut x = Extra { parts: r.u8()?, ..Extra::NONE };
    if x.parts & !parts::ALL != 0 {
        return Err(Reject::Message);
    }
    if x.has(parts::LABELS) {
        x.labels = r.array()?;
    }
    if x.has(parts::SEQADJ) {
        for direction in &mut x.seqadj {
            *direction = SeqAdj {
                correction_position: r.u32()?,
                offset_before: r.u32()?,
                offset_after: r.u32()?,
            };
        }
    }
    if x.has(parts::HELPER) {
        x.helper = r.array()?;
    }
    if x.has(parts::SYNPROXY) {
        x.synproxy = Synproxy { isn: r.u32()?, its: r.u32()?, tsoff: r.u32()? };
    }
    if x.has(parts::PROTOINFO) {
        x.protoinfo = ProtoInfo { state: r.u8()?, role: r.u8()?, value: r.u64()? };
    }
    Ok(x)
}

const FORM_V6: u8 = 1 << 0;
const FORM_TRANSLATED: u8 = 1 << 1;
const FORM_ZONES: u8 = 1 << 2;

pub(super) fn put_tuples(w: &mut Writer<'_>, c: &Connection) {
    let (o, t) = (&c.original, &c.reply);
    let six = o.family == Family::V6;
    let translated = c.is_translated();
    let zones = o.zone != 0 || t.zone != 0;
    let form = if six { FORM_V6 } else { 0 }
        | if translated { FORM_TRANSLATED } else { 0 }
        | if zones { FORM_ZONES } else { 0 };
    w.u8(form);
    w.u8(o.protocol);
    if zones {
        w.u16(o.zone);
        w.u16(t.zone);
    }
    for tuple in &[o, t][..if translated { 2 } else { 1 }] {
        w.u16(tuple.sport);
        w.u16(tuple.dport);
        for address in [tuple.src, tuple.dst] {
            match six {
                true => w.u128(address),
                false => w.u32(address as u32),
            }
        }
    }
}

pub(super) fn get_tuples(r: &mut Reader<'_>) -> Result<(Tuple, Tuple), Reject> {
    let (form, protocol) = (r.u8()?, r.u8()?);
    if form & !(FORM_V6 | FORM_TRANSLATED | FORM_ZONES) != 0 {
        return Err(Reject::Message);
    }
    let family = if form & FORM_V6 != 0 { Family::V6 } else { Family::V4 };
    let (zone, reply_zone) = if form & FORM_ZONES != 0 { (r.u16()?, r.u16()?) } else { (0, 0) };
    let mut tuple = |zone| {
        let (sport, dport) = (r.u16()?, r.u16()?);
        let mut address = || match family {
            Family::V6 => r.u128(),
            Family::V4 => r.u32().map(u128::from),
        };
        Ok(Tuple { src: address()?, dst: address()?, sport, dport, zone, protocol, family })
    };
    let original = tuple(zone)?;
    let reply = match form & FORM_TRANSLATED != 0 {
        true => tuple(reply_zone)?,
        false => Tuple { zone: reply_zone, ..original.mirrored() },
    };
    Ok((original, reply))
}
