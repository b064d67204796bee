//! The sync link: which interface it is, and the sockets that listen on it.
//!
//! Network tools delete interfaces and make them anew. The new one has another index, and what was
//! bound to the old one or had joined a group there hears nothing any more: sockets of link-local
//! addresses, and of the multicast group. So the main thread looks at the link now and then, makes
//! such sockets anew (joining waits for a lock of the kernel's, so it is nothing for a shard), and
//! hands them over.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::address::is_link_local;
use super::error::NetError;
use super::interface::{Interface, interface_of};
use super::sockets::{self, Group};
use super::steering::bind_group;

/// What is known of a sync link before it is there.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// The sync address of this member.
    pub local: IpAddr,
    /// The link's interface, if it was named.
    pub interface: Option<String>,
    /// The multicast group of the heartbeats, if they go to one.
    pub multicast: Option<IpAddr>,
    /// The group's UDP port.
    pub udp_port: u16,
    /// Receive sockets on the sync address.
    pub shards: u8,
}

/// The sockets that listen on a link.
#[derive(Debug)]
pub struct Receivers {
    /// Those on the sync address, in the order of the shards; none, if those that there are go on.
    pub shards: Vec<OwnedFd>,
    /// The one of the multicast group.
    pub group: Option<OwnedFd>,
}

/// The sync link, as it was seen last. For the main thread.
pub struct Link {
    config: LinkConfig,
    interface: Interface,
    /// Another descriptor of the group's socket, and the index on which it joined.
    joined: Option<(OwnedFd, Group)>,
}

impl Link {
    /// The link, and all its receive sockets.
    pub fn open(config: LinkConfig) -> Result<(Link, Receivers), NetError> {
        let owner = interface_of(config.local, config.interface.as_deref())?;
        let interface = match &config.interface {
            Some(name) => Interface::named(name)?,
            None => owner,
        };
        interface.check_mtu()?;
        let shards = bind_group(config.local, config.udp_port, config.shards, interface.index)
            .map_err(is_listed)?;
        let mut link = Link { config, interface, joined: None };
        let group = link.join()?;
        Ok((link, Receivers { shards, group }))
    }

    /// The interface.
    pub fn interface(&self) -> &Interface {
        &self.interface
    }

    /// New receive sockets, if the interface is another than before, or if `deaf`: the group's
    /// socket does not hear what is sent to it. As long as there is no interface or no address, the
    /// old ones stay.
    pub fn renew(&mut self, deaf: bool) -> Result<Option<Receivers>, NetError> {
        let LinkConfig { local, udp_port, shards, .. } = self.config;
        let interface = match &self.config.interface {
            Some(name) => Interface::named(name)?,
            None => interface_of(local, None)?,
        };
        let is_another = interface.index != self.interface.index;
        let should_join = deaf && self.config.multicast.is_some();
        if !is_another && !should_join {
            return Ok(None);
        }
        let receivers = match is_another && is_link_local(local) {
            true => bind_group(local, udp_port, shards, interface.index).map_err(is_listed)?,
            false => Vec::new(),
        };
        let before = std::mem::replace(&mut self.interface, interface);
        match self.join() {
            Ok(group) => Ok(Some(Receivers { shards: receivers, group })),
            Err(e) => {
                // All of it again the next time.
                self.interface = before;
                Err(e)
            }
        }
    }

    /// Joins the multicast group with a new socket. The one of before leaves it: closing that would
    /// wait for the kernel's lock in the shard. First, for on an interface that forgot its groups,
    /// leaving takes away what was joined since.
    fn join(&mut self) -> Result<Option<OwnedFd>, NetError> {
        let Some(address) = self.config.multicast else { return Ok(None) };
        if let Some((old, group)) = self.joined.take() {
            sockets::leave(&old, group);
        }
        let group = Group { address, interface: self.interface.index };
        let fd = sockets::group_receiver(group, self.config.udp_port)?;
        let ours = fd.try_clone().map_err(|e| {
            sockets::error(
                "keep the multicast group's socket",
                address,
                e.raw_os_error().unwrap_or(libc::EIO),
            )
        })?;
        self.joined = Some((ours, group));
        Ok(Some(fd))
    }
}

/// An address that is listed and cannot be bound is about to be usable, or never will be.
fn is_listed(error: NetError) -> NetError {
    match error {
        NetError::AddressNotLocal(address) => NetError::AddressTentative(address),
        other => other,
    }
}

/// What a shard is given when its link was made anew.
#[derive(Debug)]
pub struct Renewal {
    /// The interface's index by now.
    pub interface: u32,
    /// Its socket on the sync address, if that is another.
    pub receiver: Option<OwnedFd>,
    /// The multicast group's socket, if that is another.
    pub group: Option<OwnedFd>,
}

/// A renewal on its way from the main thread to a shard.
#[derive(Debug, Default)]
pub struct Handover {
    waits: AtomicBool,
    renewal: Mutex<Option<Renewal>>,
}

impl Handover {
    /// Leaves it for the shard; a socket in one that was not taken yet stays, if the new one has
    /// none in its place.
    pub fn put(&self, mut renewal: Renewal) {
        let Ok(mut place) = self.renewal.lock() else { return };
        if let Some(earlier) = place.take() {
            renewal.receiver = renewal.receiver.or(earlier.receiver);
            renewal.group = renewal.group.or(earlier.group);
        }
        *place = Some(renewal);
        self.waits.store(true, Ordering::Release);
    }

    /// Takes what was left. Never waits: what is being put there is taken the next time.
    pub fn take(&self) -> Option<Renewal> {
        if !self.waits.load(Ordering::Acquire) {
            return None;
        }
        let mut place = self.renewal.try_lock().ok()?;
        // Within the lock: what is put afterwards waits again.
        self.waits.store(false, Ordering::Relaxed);
        place.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Option<OwnedFd> {
        std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
    }

    #[test]
    fn a_renewal_is_taken_once_and_what_was_not_taken_is_not_lost() {
        let handover = Handover::default();
        assert!(handover.take().is_none());
        handover.put(Renewal { interface: 7, receiver: file(), group: None });
        handover.put(Renewal { interface: 9, receiver: None, group: file() });
        let renewal = handover.take().expect("it was left here");
        assert_eq!(renewal.interface, 9, "the newest");
        assert!(renewal.receiver.is_some() && renewal.group.is_some(), "the sockets of both");
        assert!(handover.take().is_none());
    }
}
