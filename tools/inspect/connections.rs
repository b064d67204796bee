//! Connections, one by one: `connections` and `find`.
//!
//! Each record is a consistent copy of its slot; two records may be of different moments.

use std::io::{self, Write};
use std::process::ExitCode;

use hypersync::conn::extra::parts;
use hypersync::conn::extras;
use hypersync::conn::index::Index;
use hypersync::conn::slot::{Addresses, Line};
use hypersync::conn::tuple::DCCP;
use hypersync::conn::{Coordinate, Extra, Kind, MemberId, Slot, State, Tuple, shard_of};
use hypersync::limits::MEMBERS_MAX;
use hypersync::memory::Memory;
use hypersync::seq::Seq;
use hypersync::shm::RegionView;
use hypersync::sync::stream::{Durable, stream_index};
use hypersync::word::{ReadWord, Word};
use serde_json::{Value, json};

/// How often a slot that is being written is read again before it counts as torn: a write takes
/// well under a microsecond, so only a slot that a killed appliance left half-written stays so.
const TRIES: u32 = 100_000;

/// How often a look-up that found nothing is repeated: an entry that is just being moved in the
/// index can be missed.
const LOOKUPS: u32 = 4;

/// What a slot can hold, in the words for an operator.
pub const ROLES: [&str; 7] = ["free", "leased", "held", "active", "backup", PRESUMED, "closing"];

/// A copy whose active is silent: its connection lives here, as far as this member can know.
const PRESUMED: &str = "presumed";

/// The members, a bit each, that this one does not hear: their copies here are presumed active.
pub fn silent(view: &RegionView) -> u64 {
    let is_silent = |id: &MemberId| {
        let record = (0..TRIES).find_map(|_| view.group().read(*id));
        record.is_some_and(|member| !member.status.is_alive())
    };
    (1..=MEMBERS_MAX as MemberId).filter(is_silent).fold(0, |bits, id| bits | 1 << id)
}

/// What a slot holds; one of [`ROLES`]. `silent` are the members that are not heard.
pub fn role(line: &Line, silent: u64) -> &'static str {
    match line.kind() {
        Kind::Backup if silent >> line.peer().member() & 1 == 1 => PRESUMED,
        kind => kind.name(),
    }
}

/// A whole copy of a slot; `None` if it is torn for good.
pub fn snapshot(slot: &Slot<ReadWord>) -> Option<(Line, Addresses)> {
    (0..TRIES).find_map(|_| {
        let copy = slot.snapshot();
        if copy.is_none() {
            std::hint::spin_loop();
        }
        copy
    })
}

/// A whole copy of a slot and what belongs to it in the sparse table; that is missing if it is torn
/// for good.
fn snapshot_with_extra(
    memory: &Memory<'_, ReadWord>,
    slot: u32,
) -> Option<(Line, Addresses, Option<Extra>)> {
    let words = &memory.slots[slot as usize];
    let (mut line, mut addresses) = snapshot(words)?;
    for _ in 0..TRIES {
        let extra = extras::snapshot(memory.extras, memory.extra_of, slot);
        let again = snapshot(words)?;
        // The slot counts its writes: the same twice means that it was the same in between.
        if extra.is_some() && again == (line, addresses) {
            return Some((line, addresses, extra));
        }
        (line, addresses) = again;
    }
    Some((line, addresses, None))
}

/// A connection as it is shown.
struct Shown {
    kind: Kind,
    role: &'static str,
    original: Tuple,
    reply: Tuple,
    state: State,
    /// Missing if it cannot be read.
    extra: Option<Extra>,
    here: Coordinate,
    other: Coordinate,
    former: Coordinate,
    epoch: u32,
    version: u32,
    last: Seq,
    /// The floor of the stream to the backup; for connections that have one.
    floor: Option<Seq>,
}

impl Shown {
    fn read(view: &RegionView, silent: u64, shard: u8, slot: u32) -> Option<Shown> {
        let memory = &view.shard(shard);
        let (line, addresses, extra) = snapshot_with_extra(memory, slot)?;
        if !line.kind().is_connection() && line.kind() != Kind::Closing {
            return None;
        }
        let (original, reply) = line.tuples(&addresses);
        let other = line.peer();
        let has_backup =
            matches!(line.kind(), Kind::Active | Kind::Closing) && other.is_plausible();
        let floor = has_backup
            .then(|| Durable(&memory.streams[stream_index(other.member(), other.shard())]).floor());
        let former = memory.former[slot as usize].get();
        Some(Shown {
            kind: line.kind(),
            role: role(&line, silent),
            original,
            reply,
            state: line.state(),
            extra,
            here: Coordinate::new(view.header().member, shard, slot, line.generation()),
            other,
            former: Coordinate::from_raw(former),
            epoch: line.stamp().epoch,
            version: line.stamp().version,
            last: line.last(),
            floor,
        })
    }

    /// Whether the backup has acknowledged the newest state. A copy held for another member has
    /// nothing to acknowledge; a connection that no backup knows was not.
    fn acknowledged(&self) -> Option<bool> {
        match self.kind {
            Kind::Backup => None,
            _ => Some(self.floor.is_some_and(|floor| self.last.is_passed_by(floor))),
        }
    }

    fn acknowledged_word(&self) -> &'static str {
        match self.acknowledged() {
            None => "-",
            Some(true) => "yes",
            Some(false) => "no",
        }
    }

    /// One line; columns grow with what is unusually long.
    fn write_line(&self, out: &mut dyn Write) -> io::Result<()> {
        let stamp = format!("{}.{}", self.epoch, self.version);
        write!(
            out,
            "{:<8} {:<16} {:<16} {stamp:<8} {:<5} {:<11} {:>7}  {}",
            self.role,
            self.here.to_string(),
            self.other.to_string(),
            self.acknowledged_word(),
            state_word(&self.original, &self.state),
            self.state.timeout_s,
            self.original
        )?;
        if self.reply != self.original.mirrored() {
            write!(out, "  reply {}", self.reply)?;
        }
        for (name, value) in self.extra_words() {
            write!(out, "  {name} {value}")?;
        }
        writeln!(out)
    }

    fn write_page(&self, out: &mut dyn Write) -> io::Result<()> {
        let s = &self.state;
        writeln!(out, "{}", self.original)?;
        writeln!(out, "  reply         {}", self.reply)?;
        writeln!(out, "  kind          {}", self.role)?;
        writeln!(out, "  coordinate    {}   (member/shard/slot.generation)", self.here)?;
        writeln!(out, "  other copy    {}", self.other)?;
        writeln!(out, "  former copy   {}", self.former)?;
        writeln!(out, "  stamp         epoch {}, version {}", self.epoch, self.version)?;
        write!(out, "  acknowledged  {}", self.acknowledged_word())?;
        match self.floor {
            Some(floor) if self.last != Seq::NONE => writeln!(
                out,
                "   (newest state in datagram {}, floor {})",
                self.last.raw(),
                floor.raw()
            )?,
            Some(floor) => {
                writeln!(out, "   (newest state in no datagram yet, floor {})", floor.raw())?
            }
            None => writeln!(out)?,
        }
        writeln!(
            out,
            "  state         {}, status {:#x}, mark {:#x}, timeout {} s",
            state_word(&self.original, s),
            s.status,
            s.mark,
            s.timeout_s
        )?;
        for (name, value) in self.extra_words() {
            writeln!(out, "  {name:<12}  {value}")?;
        }
        Ok(())
    }

    /// What only few connections have, in words.
    fn extra_words(&self) -> Vec<(&'static str, String)> {
        let Some(x) = &self.extra else { return vec![("extra", "half written".into())] };
        let mut words = Vec::new();
        if x.has(parts::LABELS) {
            words.push(("labels", labels_hex(x)));
        }
        if x.has(parts::HELPER) {
            words.push(("helper", x.helper_name().unwrap_or("(no text)").into()));
        }
        if x.has(parts::SEQADJ) {
            let [original, reply] = x.seqadj.map(|s| {
                let (before, after) = (s.offset_before as i32, s.offset_after as i32);
                format!("{before:+}/{after:+}@{}", s.correction_position)
            });
            words.push(("seqadj", format!("original {original}, reply {reply}")));
        }
        if x.has(parts::SYNPROXY) {
            let s = &x.synproxy;
            words.push(("synproxy", format!("isn {}, its {}, tsoff {}", s.isn, s.its, s.tsoff)));
        }
        if x.has(parts::PROTOINFO) {
            let p = &x.protoinfo;
            words.push(match self.original.protocol {
                DCCP => (
                    "dccp",
                    format!(
                        "state {}, role {}, handshake sequence number {}",
                        p.state, p.role, p.value
                    ),
                ),
                _ => (
                    "sctp",
                    format!(
                        "state {}, tags {:#010x} {:#010x}",
                        p.state,
                        p.value >> 32,
                        p.value as u32
                    ),
                ),
            });
        }
        words
    }

    /// The parts that are there; null if they cannot be read.
    fn extra_json(&self) -> Value {
        let Some(x) = &self.extra else { return Value::Null };
        let mut object = json!({});
        if x.has(parts::LABELS) {
            object["labels"] = labels_hex(x).into();
        }
        if x.has(parts::HELPER) {
            object["helper"] = x.helper_name().into();
        }
        if x.has(parts::SEQADJ) {
            let [original, reply] = x.seqadj.map(|s| {
                json!({
                    "correction_position": s.correction_position,
                    "offset_before": s.offset_before as i32,
                    "offset_after": s.offset_after as i32,
                })
            });
            object["seqadj"] = json!({ "original": original, "reply": reply });
        }
        if x.has(parts::SYNPROXY) {
            let s = &x.synproxy;
            object["synproxy"] = json!({ "isn": s.isn, "its": s.its, "tsoff": s.tsoff });
        }
        if x.has(parts::PROTOINFO) {
            let p = &x.protoinfo;
            match self.original.protocol {
                DCCP => {
                    object["dccp"] =
                        json!({ "state": p.state, "role": p.role, "handshake_seq": p.value });
                }
                _ => {
                    let (original, reply) = (p.value >> 32, p.value & 0xffff_ffff);
                    object["sctp"] =
                        json!({ "state": p.state, "vtag_original": original, "vtag_reply": reply });
                }
            }
        }
        object
    }

    fn to_json(&self) -> Value {
        let s = &self.state;
        json!({
            "kind": self.role,
            "original": tuple_json(&self.original),
            "reply": tuple_json(&self.reply),
            "translated": self.reply != Tuple { zone: self.reply.zone, ..self.original.mirrored() },
            "coordinate": coordinate_json(self.here),
            "other": coordinate_json(self.other),
            "former": coordinate_json(self.former),
            "epoch": self.epoch,
            "version": self.version,
            "acknowledged": self.acknowledged(),
            "last": (self.last != Seq::NONE).then_some(self.last.raw()),
            "floor": self.floor.map(Seq::raw),
            "state": {
                "status": s.status,
                "tcp_state": s.tcp_state,
                "tcp_scale": s.tcp_scale,
                "tcp_flags_original": s.tcp_flags_original,
                "tcp_flags_reply": s.tcp_flags_reply,
                "timeout_s": s.timeout_s,
                "mark": s.mark,
            },
            "extra": self.extra_json(),
        })
    }
}

/// `TCP_CONNTRACK_*` by number.
const TCP_STATES: [&str; 10] = [
    "none",
    "syn_sent",
    "syn_recv",
    "established",
    "fin_wait",
    "close_wait",
    "last_ack",
    "time_wait",
    "close",
    "syn_sent2",
];

fn state_word(original: &Tuple, state: &State) -> &'static str {
    match original.protocol {
        hypersync::conn::tuple::TCP => {
            TCP_STATES.get(state.tcp_state as usize).unwrap_or(&"unknown")
        }
        _ => "-",
    }
}

/// Sixteen bytes as two digits each, in the order in which ctnetlink has them.
fn labels_hex(x: &Extra) -> String {
    x.labels.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn tuple_json(t: &Tuple) -> Value {
    json!({
        "text": t.to_string(),
        "protocol": t.protocol,
        "source": t.src_ip().to_string(),
        "source_port": t.sport,
        "destination": t.dst_ip().to_string(),
        "destination_port": t.dport,
        "zone": t.zone,
    })
}

fn coordinate_json(c: Coordinate) -> Value {
    if !c.is_somewhere() {
        return Value::Null;
    }
    json!({
        "text": c.to_string(),
        "member": c.member(),
        "shard": c.shard(),
        "slot": c.slot(),
        "generation": c.generation().raw(),
    })
}

/// Every connection of every shard.
pub fn print_all(view: &RegionView, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if !json {
        writeln!(
            out,
            "{:<8} {:<16} {:<16} {:<8} {:<5} {:<11} {:>7}  connection",
            "kind", "coordinate", "other copy", "stamp", "acked", "state", "timeout"
        )?;
    }
    let silent = silent(view);
    for shard in 0..view.header().sizes.shards {
        for slot in 0..view.shard(shard).slots.len() as u32 {
            let Some(shown) = Shown::read(view, silent, shard, slot) else { continue };
            match json {
                true => writeln!(out, "{}", shown.to_json())?,
                false => shown.write_line(out)?,
            }
        }
    }
    Ok(())
}

/// The connection with this original or reply tuple; status 1 if there is none.
pub fn print_found(
    view: &RegionView,
    tuple: &Tuple,
    json: bool,
    out: &mut dyn Write,
) -> io::Result<ExitCode> {
    let found = (0..LOOKUPS).map(|_| find(view, tuple)).find(|found| !found.is_empty());
    let Some(found) = found else {
        match json {
            true => writeln!(out, "[]")?,
            false => eprintln!("hypersync-inspect: {tuple} is not in the table"),
        }
        return Ok(ExitCode::from(1));
    };
    if json {
        writeln!(out, "{}", Value::Array(found.iter().map(Shown::to_json).collect()))?;
        return Ok(ExitCode::SUCCESS);
    }
    for shown in found {
        shown.write_page(out)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What the index knows under a tuple. An original tuple is in the shard that `shard_of` names; a
/// reply tuple can be in any. More than one: a new connection that overtook the close of an old
/// one.
fn find(view: &RegionView, tuple: &Tuple) -> Vec<Shown> {
    let shards = view.header().sizes.shards;
    let home = shard_of(tuple, shards);
    let original = find_in(view, home, tuple, |shown| shown.original == *tuple);
    if !original.is_empty() {
        return original;
    }
    (0..shards)
        .flat_map(|shard| find_in(view, shard, tuple, |shown| shown.reply == *tuple))
        .collect()
}

fn find_in(
    view: &RegionView,
    shard: u8,
    tuple: &Tuple,
    is_it: impl Fn(&Shown) -> bool,
) -> Vec<Shown> {
    let memory = view.shard(shard);
    let (mut found, silent) = (Vec::new(), silent(view));
    Index::new(memory.index, view.header().index_key).find(tuple, |slot| {
        if (slot as usize) < memory.slots.len() {
            found.extend(Shown::read(view, silent, shard, slot).filter(|shown| is_it(shown)));
        }
        false
    });
    // A connection whose reply equals its original is in the index twice.
    found.dedup_by_key(|shown| shown.here);
    found
}
