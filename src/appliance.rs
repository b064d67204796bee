//! The appliance: one process, one thread a shard, and this thread, which waits for signals and
//! keeps what is not the shards' business.

#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use crate::clock;
use crate::config::{Config, EXIT_USAGE, SourceKind, SysctlMode};
use crate::conntrack::commit::Committer;
use crate::conntrack::events::Source;
use crate::conntrack::local::LocalAddresses;
use crate::conntrack::sysctl;
use crate::counters::Counters;
use crate::doorbell::Doorbell;
use crate::feed::{EVENTS_KEY, Feed, KernelParts};
use crate::group::hearing::Hearing;
use crate::group::{Group, Identity};
use crate::limits::STRAYS;
use crate::membership::{Membership, MembershipParts, Shared};
use crate::net::{
    Handover, Interface, Link, LinkConfig, NetError, Port, PortConfig, Receivers, Renewal,
};
use crate::notify::Notifier;
use crate::restart;
use crate::ring::RingError;
use crate::shard::{DOORBELL_KEY, Shard, ShardParts, Stray};
use crate::shm::ingest::Consumer;
use crate::shm::{Fresh, Location, Region, RegionConfig, ShmError};
use crate::sync::{Replica, ReplicaConfig};

/// How long a change may wait for others to travel with.
const FLUSH: Duration = Duration::from_millis(1);

/// How often two members compare what they hold.
const COMPARE: Duration = Duration::from_secs(1);

/// How long to wait for what the kernel has not yet taken back from a process that was just killed,
/// or has restarted: its port, its locked memory.
const KERNEL_PATIENCE: Duration = Duration::from_secs(1);

/// How often the sync link is looked at before it is there.
const LINK_PAUSE: Duration = Duration::from_millis(100);

/// How often the multicast group is joined again at most while nobody is heard.
const REJOIN_PAUSE: Duration = Duration::from_secs(1);

/// This host's addresses, kept up to date by the main thread for every shard.
static ADDRESSES: LocalAddresses = LocalAddresses::new();

/// Runs a member until it is told to end. Told to restart, this process becomes the next one.
pub fn run(config: &Config) -> ExitCode {
    // Before any thread exists, so that every thread inherits the mask and only this one takes
    // signals.
    block_signals();
    crate::logging::start();
    let outcome = start(config);
    log::logger().flush();
    match outcome {
        Ok(End::Left) => ExitCode::SUCCESS,
        Ok(End::Restart) => {
            // It returns only if it fails. No thread, ring or lock is left: all were this
            // function's.
            eprintln!("hypersync: {}", restart::exec());
            ExitCode::FAILURE
        }
        Err(Failure::Usage(line)) => {
            eprintln!("hypersync: {line}");
            ExitCode::from(EXIT_USAGE)
        }
        Err(Failure::Running(line)) => {
            eprintln!("hypersync: {line}");
            ExitCode::FAILURE
        }
    }
}

/// How a member ended that did not fail.
enum End {
    /// It left the group, or was told twice to end.
    Left,
    /// It said that it will be back, with the table that it leaves behind.
    Restart,
}

enum Failure {
    /// Found before the member served: it was never ready, and no datagram left.
    Usage(String),
    /// Found while running.
    Running(String),
}

fn usage(e: impl std::fmt::Display) -> Failure {
    Failure::Usage(e.to_string())
}

/// What a shard's thread is given.
struct Parts<'b> {
    shard: u8,
    receiver: OwnedFd,
    /// Of shard 0: the multicast group's socket.
    group: Option<OwnedFd>,
    interface: u32,
    committer: Option<Committer>,
    may_be_unheard: bool,
    port_ids: Vec<u32>,
    strays: Receiver<Stray>,
    handover: Vec<SyncSender<Stray>>,
    doorbells: &'b [Doorbell],
    gate: Gate,
}

/// A shard's end of the start: nobody serves, and no heartbeat leaves, before every shard could be
/// set up. A thread that cannot be drops it, and then nobody passes.
struct Gate {
    set_up: SyncSender<()>,
    go: Receiver<()>,
}

impl Gate {
    /// Says that this shard is set up, and waits for the others. `false` if one of them failed.
    fn pass(self) -> bool {
        let Gate { set_up, go } = self;
        // The main thread takes these until every sender is gone; an error means that it is gone
        // itself.
        let _ = set_up.send(());
        drop(set_up);
        go.recv().is_ok()
    }
}

fn start(config: &Config) -> Result<End, Failure> {
    let options = &config.options;
    raise_file_limit();
    // First the lock, then the sync link and the port, which a second process could join in
    // silence; then the kernel, and then the region, so that a start that cannot succeed leaves the
    // old one, and what it says of sysctls, in its place.
    let place = Location::claim(&options.shm).map_err(usage)?;
    let Some((link, receivers)) = wait_for_link(config).map_err(usage)? else {
        return Ok(End::Left);
    };
    let is_kernel = options.source == SourceKind::Kernel;
    let mut committers = Vec::new();
    let mut may_be_unheard = false;
    if is_kernel {
        ADDRESSES.watch(config.rules.interfaces());
        for name in config.rules.interfaces() {
            if Interface::named(name).is_err() {
                log::warn!(
                    "there is no interface {name} now: until it comes, 'address {name}' in a rule matches nothing"
                );
            }
        }
        ADDRESSES.refresh().map_err(usage)?;
        for _ in 0..config.shards {
            committers.push(Committer::open().map_err(usage)?);
        }
        // With another value, what was born before we listened never raises an event.
        may_be_unheard = sysctl::read(sysctl::EVENTS).map_err(usage)? != 1;
    }
    let (region, origin) = take_region(config, place).map_err(usage)?;
    let changed = match options.sysctl {
        _ if !is_kernel => None,
        SysctlMode::Set => Some(sysctl::set_needed(region.old_values()).map_err(usage)?),
        SysctlMode::Leave => {
            for (name, now) in sysctl::unmet().map_err(usage)? {
                log::warn!("restored connections need sysctl {name}=1; it is {now}: set it");
            }
            None
        }
    };
    let outcome = serve(config, &region, origin, link, receivers, committers, may_be_unheard);
    // Who restarts leaves them to the next process, with the record of what they were.
    if !matches!(outcome, Ok(End::Restart))
        && let Some(changed) = changed
        && let Err(e) = changed.put_back()
    {
        log::error!("{e}");
    }
    outcome
}

/// The region that lies in the place, if it fits, or a new one; and a line for the log of a start
/// that succeeds.
fn take_region(config: &Config, place: Location) -> Result<(Region, Option<String>), ShmError> {
    let options = &config.options;
    let wanted = RegionConfig {
        sizes: config.sizes,
        group: options.group,
        member: options.member,
        incarnation: incarnation(),
        started: clock::now(),
    };
    let fits = if options.new_table { Err(Fresh::Asked) } else { place.resumable(&wanted) };
    match fits {
        Ok(()) => {
            let region = Region::resume(place, &wanted)?;
            let line = format!("going on with table {:08x}", region.header().table_id);
            Ok((region, Some(line)))
        }
        Err(Fresh::Nothing) => Ok((Region::create_in(place, &wanted)?, None)),
        Err(why) => {
            Ok((Region::create_in(place, &wanted)?, Some(format!("starting a new table: {why}"))))
        }
    }
}

/// The sync link with its receive sockets, as soon as it is there: at boot, interfaces and
/// addresses may come later than this process. `None`: it was told to end while it waited.
///
/// After a crash the kernel lets go of the old ring's sockets only a moment after the process is
/// gone: whoever starts us again at once must not be refused for that.
fn wait_for_link(config: &Config) -> Result<Option<(Link, Receivers)>, NetError> {
    let link = LinkConfig {
        local: config.sync,
        interface: config.interface.clone(),
        multicast: config.multicast,
        udp_port: crate::ccp::UDP_PORT,
        shards: config.shards,
    };
    let mut in_use_since = None;
    let mut told = None;
    loop {
        let pause = match Link::open(link.clone()) {
            Err(NetError::PortInUse(_))
                if in_use_since.get_or_insert_with(Instant::now).elapsed() < KERNEL_PATIENCE =>
            {
                Duration::from_millis(10)
            }
            Err(e) if e.can_come_right() => {
                if told.as_ref() != Some(&e) {
                    log::warn!(
                        "waiting for the sync link, not ready: {e}; it goes on by itself then"
                    );
                    told = Some(e);
                }
                LINK_PAUSE
            }
            Ok(link) => {
                if told.is_some() {
                    log::info!("the sync link is there, on {}: going on", link.0.interface().name);
                }
                return Ok(Some(link));
            }
            Err(e) => return Err(e),
        };
        // There is nothing yet that SIGHUP could hand on.
        if matches!(wait_for_signal(pause), Some(libc::SIGTERM | libc::SIGINT)) {
            log::info!("told to end while it waited for the sync link");
            return Ok(None);
        }
    }
}

fn serve(
    config: &Config,
    region: &Region,
    origin: Option<String>,
    link: Link,
    receivers: Receivers,
    committers: Vec<Committer>,
    may_be_unheard: bool,
) -> Result<End, Failure> {
    let options = &config.options;
    let renewals = (0..config.shards).map(|_| Handover::default()).collect();
    let shared = Arc::new(Shared { renewals, ..Shared::default() });
    let interface = link.interface().clone();
    let Receivers { shards: receivers, mut group } = receivers;
    let (notifier, notify_thread) =
        Notifier::start(options.notify.clone(), options.notify_limit).map_err(usage)?;
    let port_ids: Vec<u32> = committers.iter().map(Committer::port_id).collect();
    let (senders, inboxes): (Vec<_>, Vec<_>) =
        (0..config.shards).map(|_| sync_channel(STRAYS)).unzip();
    let (set_up, set_up_by) = sync_channel(config.shards as usize);
    let (goes, gates): (Vec<_>, Vec<_>) = (0..config.shards)
        .map(|_| {
            let (go, wait) = sync_channel(1);
            (go, Gate { set_up: set_up.clone(), go: wait })
        })
        .unzip();
    drop(set_up);
    let doorbells = (0..config.shards)
        .map(|_| Doorbell::new())
        .collect::<Result<Vec<_>, _>>()
        .map_err(usage)?;
    let mut committers = committers.into_iter();
    let parts: Vec<Parts<'_>> = receivers
        .into_iter()
        .zip(inboxes)
        .zip(gates)
        .enumerate()
        .map(|(shard, ((receiver, strays), gate))| Parts {
            shard: shard as u8,
            receiver,
            group: group.take(),
            interface: interface.index,
            committer: committers.next(),
            may_be_unheard,
            port_ids: port_ids.clone(),
            strays,
            handover: senders.clone(),
            doorbells: &doorbells,
            gate,
        })
        .collect();
    drop(senders);
    let (serving, failures) = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for parts in parts {
            let shard = parts.shard;
            let (shared_here, notifier) = (&*shared, notifier.clone());
            let thread = std::thread::Builder::new().name(format!("shard-{shard}")).spawn_scoped(
                scope,
                move || {
                    let result = run_shard(config, region, shared_here, notifier, parts);
                    if result.is_err() {
                        shared_here.failed.store(true, Ordering::Relaxed);
                    }
                    result
                },
            );
            match thread {
                Ok(thread) => threads.push(thread),
                Err(e) => {
                    shared.failed.store(true, Ordering::Relaxed);
                    log::error!("a thread cannot be started: {e}");
                }
            }
        }
        // Ends once every thread has said so or ended.
        let serving = set_up_by.iter().count() == config.shards as usize;
        if serving {
            if let Some(line) = origin {
                log::info!("{line}");
            }
            log::info!(
                "member {} of group {}: {} shards, {} slots each, sync {} on {}, table {:08x}",
                options.member,
                options.group,
                config.shards,
                config.sizes.memory.capacity,
                config.sync,
                interface.name,
                region.header().table_id
            );
            region.publish_ready();
            for go in &goes {
                // There is room for the word; an error means that the thread panicked, which `join`
                // tells.
                let _ = go.send(());
            }
            attend(config, region, &shared, link, &doorbells);
        }
        drop(goes);
        let failures: Vec<String> = threads
            .into_iter()
            .filter_map(|thread| match thread.join() {
                Ok(Ok(())) => None,
                Ok(Err(line)) => Some(line),
                Err(_) => {
                    // Taken up again, the table would most likely bring about the same.
                    region.end();
                    Some("a shard failed an assertion; its message is above".to_owned())
                }
            })
            .collect();
        (serving, failures)
    });
    drop(notifier);
    if notify_thread.join().is_err() {
        log::error!("the notify thread failed");
    }
    match failures.into_iter().next() {
        None if shared.failed.load(Ordering::Relaxed) => {
            Err(Failure::Running("a shard could not be started".into()))
        }
        None if shared.restarts.load(Ordering::Relaxed) => {
            if shared.stop.load(Ordering::Relaxed) {
                // Told to end when the others already waited for its return: the next process
                // leaves the group. SAFETY: no memory arguments. The signal is blocked, and stays
                // pending for that process.
                unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
            }
            Ok(End::Restart)
        }
        None => Ok(End::Left),
        Some(line) if !serving => Err(Failure::Usage(line)),
        Some(line) => Err(Failure::Running(line)),
    }
}

/// Marks the process as failed if its thread unwinds, so that the others end as well.
struct FailOnPanic<'m>(&'m Shared);

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed.store(true, Ordering::Relaxed);
        }
    }
}

/// The shard's port. The kernel unlocks the memory of the last process's ring only a moment after
/// that is gone: who goes on with its table waits for it.
fn open_port<'m>(
    config: &PortConfig<'m>,
    receiver: OwnedFd,
    group: Option<OwnedFd>,
    is_resumed: bool,
) -> Result<Port<'m>, NetError> {
    // Another descriptor of the same socket, for it goes with a port that could not be made.
    let again = |fd: &OwnedFd| {
        fd.try_clone().map_err(|e| NetError::Socket {
            what: "keep the receive socket",
            address: config.local,
            errno: e.raw_os_error().unwrap_or(libc::EIO),
        })
    };
    let end = Instant::now() + KERNEL_PATIENCE;
    loop {
        match Port::new(config, again(&receiver)?, group.as_ref().map(again).transpose()?) {
            Err(NetError::Ring(RingError::MemoryLock { .. }))
                if is_resumed && Instant::now() < end =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

fn run_shard(
    config: &Config,
    region: &Region,
    shared: &Shared,
    notifier: Notifier,
    parts: Parts<'_>,
) -> Result<(), String> {
    let _guard = FailOnPanic(shared);
    let options = &config.options;
    let Parts {
        shard,
        receiver,
        group,
        interface,
        committer,
        may_be_unheard,
        port_ids,
        strays,
        handover,
        doorbells,
        gate,
    } = parts;
    pin(shard);
    let header = region.header();
    let memory = region.shard(shard);
    let mut port = open_port(
        &PortConfig {
            local: config.sync,
            shard,
            udp_port: crate::ccp::UDP_PORT,
            interface,
            multicast: config.multicast,
            heartbeat_peers: config.peers.clone(),
            arena: memory.arena,
            send: options.send,
            features: options.features,
            receive_buffers: 32,
        },
        receiver,
        group,
        region.is_resumed(),
    )
    .map_err(|e| e.to_string())?;
    let again = |fd: BorrowedFd<'_>| {
        fd.try_clone_to_owned().map_err(|e| format!("cannot watch a descriptor: {e}"))
    };
    port.add_watch(DOORBELL_KEY, again(doorbells[shard as usize].fd())?);
    let feed = match options.source {
        SourceKind::Ring => Feed::ring(Consumer::new(region.ring(shard)), config.rules.clone()),
        SourceKind::Kernel => {
            let source = Source::open(shard, config.shards, &port_ids, options.event_buffer)
                .map_err(|e| e.to_string())?;
            port.add_watch(EVENTS_KEY, again(source.fd())?);
            Feed::kernel(KernelParts {
                source,
                committer: committer.ok_or("a committer was not opened")?,
                addresses: &ADDRESSES,
                rules: config.rules.clone(),
                commit: config.commit,
                may_be_unheard,
                verify: options.verify,
                capacity: config.sizes.memory.capacity as u32,
                resumed: region.is_resumed(),
            })
        }
    };
    let replica_config = ReplicaConfig {
        group: options.group,
        member: options.member,
        shard,
        shards: config.shards,
        site: options.site,
        table_id: header.table_id,
        index_key: header.index_key,
        hold: options.hold,
        reprotect_after: options.reprotect_after,
        flush: FLUSH,
        compare: COMPARE,
        commit: config.commit,
    };
    let replica = match region.is_resumed() {
        true => {
            let (replica, torn) = Replica::resume(replica_config, memory, clock::now());
            if torn > 0 {
                log::info!(
                    "shard {shard}: {torn} slots were being written when the last process ended: they are freed"
                );
            }
            replica
        }
        false => Replica::new(replica_config, memory),
    };
    let membership = (shard == 0).then(|| {
        let identity = Identity {
            member: options.member,
            shards: config.shards,
            priority: options.priority,
            site: options.site,
            table_id: header.table_id,
            incarnation: header.incarnation,
            heartbeat: options.heartbeat,
            dead_after: options.dead_after,
        };
        let now = clock::now();
        let dead_time = options.heartbeat * options.dead_after;
        let counters = Counters::new(memory.counters);
        let group = Group::new(identity, now);
        let hearing = Hearing::new(config.peers.clone(), dead_time, now);
        let group_number = options.group;
        let parts = MembershipParts {
            group,
            group_number,
            hearing,
            region,
            shared,
            notifier,
            counters,
            dead_time,
            drain_limit: options.drain_limit,
        };
        Membership::new(parts, now)
    });
    log::debug!("shard {shard}: kernel features {:?}", port.features());
    let mut shard = Shard::new(ShardParts {
        shard,
        member: options.member,
        replica,
        port,
        feed,
        membership,
        region,
        shared,
        strays,
        handover,
        doorbells,
    });
    match gate.pass() {
        true => shard.run().map_err(|e| e.to_string()),
        false => Ok(()),
    }
}

/// Waits for signals; keeps the list of this host's addresses, and an eye on the sync link.
fn attend(config: &Config, region: &Region, shared: &Shared, link: Link, doorbells: &[Doorbell]) {
    let mut attendant = LinkAttendant { link, joined: Instant::now(), told: None };
    let mut asked = false;
    let mut told = None;
    while !shared.finished.load(Ordering::Relaxed) && !shared.failed.load(Ordering::Relaxed) {
        // Shards that restart end within milliseconds, and others wait for the next process.
        let restarting = shared.restart.load(Ordering::Relaxed) != 0;
        match wait_for_signal(Duration::from_millis(if restarting { 2 } else { 200 })) {
            None => {}
            Some(libc::SIGHUP) => {
                let back = restart::back_within(region.take_back_within());
                log::info!(
                    "restarting: the others are told that this member is back within {back:?}"
                );
                shared.restart.store(back.as_millis() as u32, Ordering::Relaxed);
            }
            Some(_) => {
                if asked {
                    // Asked twice: no goodbye, no waiting for others.
                    shared.finished.store(true, Ordering::Relaxed);
                }
                log::info!("leaving the group");
                asked = true;
                shared.stop.store(true, Ordering::Relaxed);
                doorbells.iter().for_each(Doorbell::ring);
            }
        }
        attendant.look(shared, doorbells);
        if config.options.source == SourceKind::Kernel {
            let trouble = ADDRESSES.refresh().err();
            if let Some(e) = trouble.as_ref().filter(|_| trouble != told) {
                log::warn!("{e}");
            }
            told = trouble;
        }
    }
}

/// The main thread's eye on the sync link.
struct LinkAttendant {
    link: Link,
    /// When its sockets were made.
    joined: Instant,
    told: Option<NetError>,
}

impl LinkAttendant {
    /// If the link was made anew, or nobody is heard, every shard gets new sockets.
    fn look(&mut self, shared: &Shared, doorbells: &[Doorbell]) {
        let before = self.link.interface().index;
        let deaf = shared.deaf.load(Ordering::Relaxed) && self.joined.elapsed() >= REJOIN_PAUSE;
        let Receivers { shards, mut group } = match self.link.renew(deaf) {
            Ok(None) => return,
            Ok(Some(receivers)) => receivers,
            Err(e) if e.can_come_right() => return, // Nothing is lost yet that could be had again.
            Err(e) => {
                if self.told.as_ref() != Some(&e) {
                    log::error!("the sync link: {e}");
                    self.told = Some(e);
                }
                return;
            }
        };
        (self.joined, self.told) = (Instant::now(), None);
        let Interface { name, index, .. } = self.link.interface();
        if *index != before {
            log::info!("the sync link, {name}, was made anew: listening there again");
        }
        let mut receivers = shards.into_iter();
        for (handover, doorbell) in shared.renewals.iter().zip(doorbells) {
            handover.put(Renewal {
                interface: *index,
                receiver: receivers.next(),
                group: group.take(),
            });
            doorbell.ring();
        }
    }
}

fn signals() -> libc::sigset_t {
    // SAFETY: a zeroed sigset_t is a valid object for sigemptyset to fill in; both calls only write
    // to it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        libc::sigaddset(&mut set, libc::SIGHUP);
        set
    }
}

fn block_signals() {
    let set = signals();
    // SAFETY: `set` is a filled-in signal set; the old mask is not asked for.
    let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
    assert_eq!(result, 0, "SIG_BLOCK and a valid set are never refused");
}

/// SIGTERM, SIGINT or SIGHUP, if one came within this time.
fn wait_for_signal(limit: Duration) -> Option<i32> {
    let set = signals();
    let limit =
        libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos() as i64 };
    // SAFETY: both pointers are to live, filled-in objects; the signal's details are not asked for.
    let signal = unsafe { libc::sigtimedwait(&set, std::ptr::null_mut(), &limit) };
    (signal > 0).then_some(signal)
}

/// Pins the thread to the shard's processor, if there is one for it. Without, it runs all the same.
fn pin(shard: u8) {
    // SAFETY: a zeroed cpu_set_t is the empty set; the calls read and write only these sets, for
    // the calling thread.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut allowed) != 0 {
            return;
        }
        let cpus: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|cpu| libc::CPU_ISSET(*cpu, &allowed)).collect();
        let Some(cpu) = cpus.get(shard as usize % cpus.len().max(1)) else { return };
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(*cpu, &mut one);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &one);
    }
}

/// A number for this run of the process: random, so that no two runs share it.
fn incarnation() -> u64 {
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is 8 bytes long, and the call writes at most that.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    assert_eq!(got, 8, "getrandom gives small buffers whole");
    u64::from_ne_bytes(bytes) | 1
}

/// Streams have a socket each: as many descriptors as we may have.
fn raise_file_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the calls read and write this one struct.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && limit.rlim_cur < limit.rlim_max
        {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}
