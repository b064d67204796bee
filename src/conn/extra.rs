//! What only few connections have: labels, sequence adjustment, a helper, SYN proxy, SCTP and DCCP
//! state.
//!
//! Few enough that a slot has no room for it: a slot that needs an [`Extra`] refers to a record in
//! a sparse table beside the slots (`conn::extras`).

/// Which parts of an [`Extra`] are there.
pub mod parts {
    /// Connection labels.
    pub const LABELS: u8 = 1 << 0;
    /// Sequence adjustment, both directions.
    pub const SEQADJ: u8 = 1 << 1;
    /// The name of the helper.
    pub const HELPER: u8 = 1 << 2;
    /// SYN proxy.
    pub const SYNPROXY: u8 = 1 << 3;
    /// State of SCTP or DCCP.
    pub const PROTOINFO: u8 = 1 << 4;
    /// Every part.
    pub const ALL: u8 = LABELS | SEQADJ | HELPER | SYNPROXY | PROTOINFO;
}

/// Bytes of a helper's name: `NF_CT_HELPER_NAME_LEN`, with the zero behind it.
pub const HELPER_NAME: usize = 16;

/// How sequence numbers of one direction are shifted (`struct nf_ct_seqadj`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SeqAdj {
    /// Where in the stream the latest shift begins.
    pub correction_position: u32,
    /// The shift before that, two's complement.
    pub offset_before: u32,
    /// The shift from there on, two's complement.
    pub offset_after: u32,
}

impl SeqAdj {
    /// Whether the kernel has shifted on since `other`. Each shift begins behind the one before it.
    fn is_beyond(&self, other: &SeqAdj) -> bool {
        let distance = self.correction_position.wrapping_sub(other.correction_position) as i32;
        *self != SeqAdj::default() && (*other == SeqAdj::default() || distance > 0)
    }
}

/// What a SYN proxy shifts by (`struct nf_conn_synproxy`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Synproxy {
    /// Initial sequence number of the proxy.
    pub isn: u32,
    /// Initial timestamp.
    pub its: u32,
    /// Shift of timestamps.
    pub tsoff: u32,
}

/// State of SCTP or DCCP, whichever the connection's protocol is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ProtoInfo {
    /// `SCTP_CONNTRACK_*` or `CT_DCCP_*`.
    pub state: u8,
    /// DCCP: which side the client is. SCTP: 0.
    pub role: u8,
    /// SCTP: verification tags, original direction in the high 32 bits, reply in the low ones.
    /// DCCP: the handshake's sequence number.
    pub value: u64,
}

/// The parts of a connection that few have. What is not among `parts` is zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Extra {
    /// Which are there; see [`parts`]. In what a source saw: which it knew.
    pub parts: u8,
    /// Connection labels, in the order in which ctnetlink has the bytes.
    pub labels: [u8; 16],
    /// Sequence adjustment: original direction, reply direction.
    pub seqadj: [SeqAdj; 2],
    /// The helper's name, zeros behind it.
    pub helper: [u8; HELPER_NAME],
    /// SYN proxy.
    pub synproxy: Synproxy,
    /// SCTP or DCCP.
    pub protoinfo: ProtoInfo,
}

impl Extra {
    /// Nothing.
    pub const NONE: Extra = Extra {
        parts: 0,
        labels: [0; 16],
        seqadj: [SeqAdj { correction_position: 0, offset_before: 0, offset_after: 0 }; 2],
        helper: [0; HELPER_NAME],
        synproxy: Synproxy { isn: 0, its: 0, tsoff: 0 },
        protoinfo: ProtoInfo { state: 0, role: 0, value: 0 },
    };

    /// Whether a part is there.
    pub fn has(&self, part: u8) -> bool {
        self.parts & part != 0
    }

    /// Whether nothing is there.
    pub fn is_none(&self) -> bool {
        self.parts == 0
    }

    /// Takes over the parts that `newer` knows; the others keep their last known value.
    pub fn merge(&mut self, newer: &Extra) {
        self.parts |= newer.parts;
        if newer.has(parts::LABELS) {
            self.labels = newer.labels;
        }
        if newer.has(parts::SEQADJ) {
            self.seqadj = newer.seqadj;
        }
        if newer.has(parts::HELPER) {
            self.helper = newer.helper;
        }
        if newer.has(parts::SYNPROXY) {
            self.synproxy = newer.synproxy;
        }
        if newer.has(parts::PROTOINFO) {
            self.protoinfo = newer.protoinfo;
        }
    }

    /// Whether sequence numbers are shifted further than `other` has it, in one direction or both.
    pub fn is_shifted_beyond(&self, other: &Extra) -> bool {
        let mut directions = self.seqadj.iter().zip(&other.seqadj);
        self.has(parts::SEQADJ) && directions.any(|(here, there)| here.is_beyond(there))
    }

    /// The helper's name, if it is text.
    pub fn helper_name(&self) -> Option<&str> {
        let end = self.helper.iter().position(|b| *b == 0).unwrap_or(HELPER_NAME);
        match self.has(parts::HELPER) {
            true => std::str::from_utf8(&self.helper[..end]).ok(),
            false => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shift_is_beyond_another_however_positions_wrap() {
        let shifted = |correction_position, offset_after| Extra {
            parts: parts::SEQADJ,
            seqadj: [
                SeqAdj { correction_position, offset_before: 0, offset_after },
                SeqAdj::default(),
            ],
            ..Extra::NONE
        };
        let (first, second) = (shifted(u32::MAX - 5, 3), shifted(7, 6));
        assert!(second.is_shifted_beyond(&first) && !first.is_shifted_beyond(&second));
        assert!(first.is_shifted_beyond(&Extra::NONE) && !Extra::NONE.is_shifted_beyond(&first));
        assert!(!first.is_shifted_beyond(&first));
        let reply = Extra {
            seqadj: [first.seqadj[0], SeqAdj { offset_after: 1, ..first.seqadj[0] }],
            ..first
        };
        assert!(reply.is_shifted_beyond(&first) && !first.is_shifted_beyond(&reply));
    }

    #[test]
    fn what_is_left_out_keeps_its_last_known_value() {
        let mut known = Extra { parts: parts::LABELS, labels: [7; 16], ..Extra::NONE };
        let mut helper = [0; HELPER_NAME];
        helper[..3].copy_from_slice(b"ftp");
        known.merge(&Extra { parts: parts::HELPER, helper, labels: [9; 16], ..Extra::NONE });
        assert_eq!((known.parts, known.labels), (parts::LABELS | parts::HELPER, [7; 16]));
        assert_eq!(known.helper_name(), Some("ftp"));
        known.merge(&Extra { parts: parts::LABELS, ..Extra::NONE });
        assert_eq!((known.labels, known.helper_name()), ([0; 16], Some("ftp")));
    }
}
