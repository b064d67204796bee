//! Which connections the protocol is told of: what the rules say of each that a source sees.

use crate::conn::Kind;
use crate::conn::slot::groups;
use crate::conntrack::local::LocalView;
use crate::counters::{Counter, Counters};
use crate::rules::{Rules, Verdict};
use crate::source::SourceEvent;
use crate::sync::Replica;
use crate::time::Time;

/// Whether the protocol is told of this event. A connection of ours that a rule skips from now on
/// (its mark has changed, say) is let go, here and at its backup.
pub(super) fn admits(
    now: Time,
    rules: &Rules,
    local: Option<&LocalView>,
    event: &SourceEvent,
    replica: &mut Replica<'_>,
    counters: &Counters<'_>,
) -> bool {
    let SourceEvent::Seen { connection, known } = event else { return true };
    let verdict = if rules.uses_mark()
        && known & groups::MARK == 0
        && let Some(slot) = replica.table().find_original(&connection.original)
    {
        // What the event left out has not changed.
        let mut connection = *connection;
        connection.state.mark = replica.table().line(slot).state().mark;
        rules.verdict(&connection, local)
    } else {
        rules.verdict(connection, local)
    };
    match verdict {
        Verdict::Copy => true,
        Verdict::Local => {
            counters.count(Counter::SourceLocal);
            false
        }
        Verdict::Skipped => {
            counters.count(Counter::SourceFiltered);
            let original = connection.original;
            let ours = replica
                .table()
                .find_original(&original)
                .filter(|slot| matches!(replica.table().kind(*slot), Kind::Held | Kind::Active));
            if ours.is_some() {
                replica.handle_source(now, &SourceEvent::gone(original));
            }
            false
        }
    }
}
