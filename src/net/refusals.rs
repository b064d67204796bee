//! Sends that this host itself refuses: told with their cause, once and not once a datagram.
//!
//! What the kernel says of a send is the caller's to count; here an operator is told what to do
//! about it. A dead peer's ECONNREFUSED is no refusal of ours.

use std::fmt;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use crate::limits::PEERS_MAX;
use crate::time::Time;

/// A target is told about at most once in this time; what did not happen for so long is news when
/// it does.
const PAUSE: Duration = Duration::from_secs(10);

struct Refusal {
    to: IpAddr,
    errno: i32,
    told: Time,
    last: Time,
}

/// Targets remembered: every peer and the multicast group. Addresses that members had before are
/// not worth more.
const TARGETS_MAX: usize = PEERS_MAX + 1;

/// What was told; one for all shards of a member. Touched by nobody as long as sends succeed.
pub struct Refusals(Mutex<Vec<Refusal>>);

impl Default for Refusals {
    fn default() -> Refusals {
        Refusals(Mutex::new(Vec::with_capacity(TARGETS_MAX)))
    }
}

/// The line about a refused send.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    to: IpAddr,
    word: &'static str,
    cause: &'static str,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sending to {} {} ({})", self.to, self.cause, self.word)
    }
}

impl Refusals {
    /// A send failed. Returns the line that an operator should see, if it is news.
    pub fn note(&self, now: Time, to: IpAddr, errno: i32) -> Option<Refused> {
        let (word, cause) = cause(errno)?;
        // Another shard is telling: if this one has more to say, it will again in a moment.
        let mut refusals = self.0.try_lock().ok()?;
        let is_full = refusals.len() == TARGETS_MAX;
        let line = Refused { to, word, cause };
        match refusals.iter_mut().find(|refusal| refusal.to == to) {
            Some(refusal) => {
                let is_news = refusal.errno != errno || now.since(refusal.last) >= PAUSE;
                refusal.last = now;
                if !is_news || now.since(refusal.told) < PAUSE {
                    return None;
                }
                (refusal.errno, refusal.told) = (errno, now);
                Some(line)
            }
            None if is_full => None,
            None => {
                refusals.push(Refusal { to, errno, told: now, last: now });
                Some(line)
            }
        }
    }
}

fn cause(errno: i32) -> Option<(&'static str, &'static str)> {
    Some(match errno {
        libc::EPERM => (
            "EPERM",
            "is refused by this host's packet filter: let UDP port 8116 out on the sync link",
        ),
        libc::EACCES => ("EACCES", "is forbidden by a route or a security policy of this host"),
        libc::ENETUNREACH => {
            ("ENETUNREACH", "fails, there is no route: is the sync link up, with its address?")
        }
        libc::EHOSTUNREACH => {
            ("EHOSTUNREACH", "fails, nobody answers there: is that host up and on the same link?")
        }
        libc::ENETDOWN => ("ENETDOWN", "fails, the sync link is down: look at `ip link`"),
        libc::EADDRNOTAVAIL => {
            ("EADDRNOTAVAIL", "fails, the sync link has lost its address: look at `ip address`")
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_once_and_again_when_it_changes() {
        let refusals = Refusals::default();
        let (two, three) = (IpAddr::from([10, 9, 0, 2]), IpAddr::from([10, 9, 0, 3]));
        let told = |at_ms: u64, to, errno| refusals.note(Time(at_ms * 1_000_000), to, errno);
        let line = told(1, two, libc::EPERM).unwrap().to_string();
        assert!(
            line.starts_with("sending to 10.9.0.2 is refused by this host's packet filter"),
            "{line}"
        );
        assert!(told(1, three, libc::EPERM).is_some());
        assert!((1..300).all(|n| told(n * 100, two, libc::EPERM).is_none()), "not once a datagram");
        assert!(told(30_000, two, libc::ENETUNREACH).is_some(), "another cause");
        assert!(told(30_100, two, libc::EPERM).is_none(), "not so soon");
        assert!(told(40_000, two, libc::EPERM).is_some());
        assert!(told(51_000, two, libc::EPERM).is_some(), "it had been well for a while");
        assert!(told(99_000, two, libc::ECONNREFUSED).is_none(), "the peer's matter");
    }
}
