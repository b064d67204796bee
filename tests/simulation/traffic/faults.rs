//! What happens to gateways: routes that move, kernels and processes that die, operators and other
//! programs.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use hypersync::conn::extra::parts;
use hypersync::conn::tuple::TCP;
use hypersync::conn::{Connection, Family, MemberId, State, Tuple};
use hypersync::conntrack::codec::status;
use hypersync::time::Time;

use super::flow::Flow;
use super::model::{By, Timeouts, tcp};
use super::sim::{FTP, LEFT_FOR, Planted, SERVER, Sim, VIP};
use crate::checkers::Broken;
use crate::world::story::ms;

/// The longest timeout that another program gives an entry, in seconds.
const GIVEN_S: u64 = 20;

impl Sim<'_> {
    fn other_than(&mut self, member: MemberId) -> MemberId {
        let others: Vec<MemberId> =
            (1..=self.plan.shards.len() as MemberId).filter(|other| *other != member).collect();
        others[self.rng.below(others.len() as u64) as usize]
    }

    /// The routes of a group of clients move.
    fn reroute(&mut self, route: usize, to: MemberId) {
        self.world.note(to, "route", format_args!("{route} from {}", self.routes[route]));
        self.routes[route] = to;
        if let Some(kernel) = self.kernel(to) {
            kernel.has_address.set(true);
        }
        self.waits_in_vain(to);
    }

    /// The address is back before this member has told that it had left, or its process dies: what
    /// it would have told the others is lost.
    fn waits_in_vain(&mut self, member: MemberId) {
        let now = self.world.now;
        let waits = |flow: &&mut Flow| {
            flow.lacking.contains(&member) && flow.left.is_some_and(|at| now.since(at) < LEFT_FOR)
        };
        for flow in self.flows.iter_mut().filter(waits) {
            (flow.is_intact, flow.is_safe) = (false, false);
        }
    }

    /// The address that connections are masqueraded behind has gone from gateways: their kernels
    /// drop those connections.
    pub(super) fn addresses_leave(&mut self) {
        let now = self.world.now;
        let (due, later) =
            std::mem::take(&mut self.leaving).into_iter().partition(|(at, _)| at.reached(now));
        self.leaving = later;
        let due: Vec<(Time, MemberId)> = due;
        for (_, member) in due {
            let Some(kernel) = self.kernel(member) else { continue };
            self.world.note(member, "address", format_args!("gone"));
            let before: BTreeSet<Tuple> =
                kernel.entries(now).iter().map(|entry| entry.original).collect();
            kernel
                .act(now, |table, now| table.drop_address(now, Family::V4, u32::from(VIP) as u128));
            let after: BTreeSet<Tuple> =
                kernel.entries(now).iter().map(|entry| entry.original).collect();
            let is_back = self.routes.contains(&member);
            kernel.has_address.set(is_back);
            let host = &self.world.hosts[&member];
            // Whoever has its copy goes on with it, and has the address.
            let goes_on = !is_back && host.running && !host.paused && self.world.cut.is_empty();
            self.are_cut_at(member, &(&before - &after), goes_on);
        }
    }

    /// What passes this gateway, and has lost its entry there, is cut, as is meant; what passes
    /// elsewhere goes on, and so does what was safe if it is `left` to who has its copy. (A third
    /// member is not asked for it yet.)
    fn are_cut_at(&mut self, member: MemberId, gone: &BTreeSet<Tuple>, is_left: bool) {
        let now = self.world.now;
        let comes_to = self.routes[0];
        let known: BTreeSet<Tuple> =
            gone.iter().filter(|tuple| self.has_it(comes_to, tuple)).copied().collect();
        for flow in self.flows.iter_mut().filter(|flow| gone.contains(&flow.original)) {
            let goes_on = is_left && flow.is_safe && known.contains(&flow.original);
            if flow.passed.is_none_or(|(_, at)| at == member) && !goes_on {
                (flow.is_intact, flow.is_safe) = (false, false);
            }
            flow.lacking.push(member);
            flow.left = is_left.then_some(now);
            flow.is_intact &= !goes_on;
        }
        self.planted.retain(|planted| !gone.contains(&planted.connection.original));
    }

    fn reroute_all(&mut self, from: MemberId, to: MemberId) {
        // The address goes with the routes: before the first packet elsewhere, or after.
        if self.plan.nat == Some(true) && self.routes.contains(&from) {
            let soon = ms([0, 20, 300][self.rng.below(3) as usize]);
            self.leaving.push((self.world.now.after(soon), from));
        }
        for route in 0..self.routes.len() {
            if self.routes[route] == from {
                self.reroute(route, to);
            }
        }
    }

    pub(super) fn fault(&mut self) -> Result<(), Broken> {
        let victim = 1 + self.rng.below(self.plan.shards.len() as u64) as MemberId;
        let other = self.other_than(victim);
        let is_there =
            self.kernels.borrow().contains_key(&victim) && self.world.hosts[&victim].running;
        if !is_there {
            return Ok(());
        }
        let span = ms([50, 500, 3000][self.rng.below(3) as usize] + self.rng.below(1000));
        match self.rng.below(13) {
            10 | 11 => self.program(victim),
            12 => self.tunes(),
            0 | 1 => self.planned(victim, other),
            2 => self.power_off(victim, other),
            3 | 4 => self.sleeps(victim, other, span),
            5 => self.restarts(victim, other, span),
            6 => self.is_cut_off(victim, other, span),
            _ => self.operator(victim),
        }
    }

    /// Routes move while both gateways live, perhaps back and forth.
    fn planned(&mut self, from: MemberId, to: MemberId) -> Result<(), Broken> {
        if !self.is_calm() {
            return Ok(());
        }
        for turn in 0..1 + self.rng.below(4) {
            if turn == 0 || self.is_calm() {
                self.disturb();
            }
            let (from, to) = if turn % 2 == 0 { (from, to) } else { (to, from) };
            self.reroute_all(from, to);
            let span =
                ms([0, 5, 100, 2000, 12_000][self.rng.below(5) as usize] + self.rng.below(10));
            self.run_for(span, true)?;
        }
        Ok(())
    }

    /// A gateway dies, kernel and all.
    fn power_off(&mut self, victim: MemberId, other: MemberId) -> Result<(), Broken> {
        self.disturb();
        self.world.note(victim, "power off", format_args!(""));
        self.world.kill(victim);
        self.kernels.borrow_mut().remove(&victim);
        for flow in &mut self.flows {
            if flow.passed.is_some_and(|(_, at)| at == victim) {
                flow.is_intact = false;
            }
            // Nor does it come back by itself when that gateway is there again.
            if let Some((_, routed)) = flow.way.as_mut().filter(|(way, _)| *way == victim) {
                *routed = 0;
            }
        }
        let detected = ms(self.rng.below(1500));
        self.run_for(detected, true)?;
        self.reroute_all(victim, other);
        let away = ms(self.rng.below(6000));
        self.run_for(away, true)
    }

    /// A process stands still while its kernel goes on; the routes may move meanwhile.
    fn sleeps(&mut self, victim: MemberId, other: MemberId, span: Duration) -> Result<(), Broken> {
        self.disturb();
        self.world.note(victim, "stop", format_args!("{span:?}"));
        self.world.pause(victim, true);
        self.meanwhile(victim, other, span)?;
        self.world.note(victim, "continue", format_args!(""));
        self.world.pause(victim, false);
        Ok(())
    }

    /// Routes stay, move, or move and come back; or they move to this very gateway. An operator may
    /// not know of it.
    fn meanwhile(
        &mut self,
        victim: MemberId,
        other: MemberId,
        span: Duration,
    ) -> Result<(), Broken> {
        let moves = self.rng.below(4);
        let early = span.mul_f64(self.rng.below(1000) as f64 / 1000.0);
        self.run_for(early, true)?;
        match moves {
            0 => {}
            3 => self.reroute_all(other, victim),
            _ => self.reroute_all(victim, other),
        }
        let mut rest = span - early;
        if self.rng.chance(20) {
            let until = rest.mul_f64(self.rng.below(1000) as f64 / 1000.0);
            self.run_for(until, true)?;
            let at = if self.rng.chance(50) { victim } else { other };
            self.operator(at)?;
            rest -= until;
        }
        self.run_for(rest, true)?;
        if moves == 2 {
            self.reroute_all(other, victim);
        }
        Ok(())
    }

    /// A process is killed, and comes back over its memory or with a new one.
    fn restarts(
        &mut self,
        victim: MemberId,
        other: MemberId,
        span: Duration,
    ) -> Result<(), Broken> {
        self.disturb();
        self.world.note(victim, "killed", format_args!("{span:?}"));
        self.waits_in_vain(victim);
        self.world.kill(victim);
        if let Some(kernel) = self.kernel(victim) {
            kernel.listen(0);
        }
        self.meanwhile(victim, other, span)?;
        if self.rng.chance(60) {
            self.world.resume(victim);
        } else {
            self.anew_at.insert(victim, self.world.now);
            self.start(victim);
        }
        Ok(())
    }

    /// Two members do not hear each other.
    fn is_cut_off(
        &mut self,
        victim: MemberId,
        other: MemberId,
        span: Duration,
    ) -> Result<(), Broken> {
        self.disturb();
        self.world.note(victim, "cut", format_args!("off from all others, {span:?}"));
        for a in 1..=self.plan.shards.len() as MemberId {
            if a != victim {
                self.world.cut.extend([(a, victim), (victim, a)]);
            }
        }
        self.meanwhile(victim, other, span)?;
        self.world.cut.clear();
        Ok(())
    }

    /// An operator flushes or deletes entries.
    fn operator(&mut self, member: MemberId) -> Result<(), Broken> {
        let Some(kernel) = self.kernel(member) else { return Ok(()) };
        self.disturb();
        let is_flush = self.rng.chance(50);
        let share = self.rng.below(100);
        self.world.note(member, "operator", format_args!("flush {is_flush}, {share} percent"));
        let now = self.world.now;
        let mut gone = BTreeSet::new();
        for entry in kernel.entries(now) {
            if is_flush || self.rng.chance(share) {
                let _ = kernel.act(now, |table, now| table.delete(now, By::Tool, &entry.original));
                gone.insert(entry.original);
            }
        }
        self.are_cut_at(member, &gone, false);
        Ok(())
    }

    /// An operator changes how long kernels keep entries.
    fn tunes(&mut self) -> Result<(), Broken> {
        let mut changed = self.timeouts[0].clone();
        let Timeouts { tcp, udp, udp_stream, .. } = &mut changed;
        for seconds in tcp.iter_mut().chain([udp, udp_stream]) {
            *seconds = *seconds * [1, 2, 3][self.rng.below(3) as usize] / 2;
        }
        self.world.note(0, "timeouts", format_args!("{changed:?}"));
        let only = self
            .rng
            .chance(50)
            .then(|| 1 + self.rng.below(self.plan.shards.len() as u64) as MemberId);
        let now = self.world.now;
        for (member, kernel) in self.kernels.borrow().iter() {
            if only.is_none_or(|only| only == *member) {
                kernel.act(now, |table, _| table.settings().timeouts = changed.clone());
            }
        }
        self.timeouts.push(changed);
        Ok(())
    }

    /// Another program writes entries: it creates some, and sets timeouts or marks of others.
    fn program(&mut self, member: MemberId) -> Result<(), Broken> {
        let Some(kernel) = self.kernel(member) else { return Ok(()) };
        self.disturb();
        let now = self.world.now;
        let (share, is_mark) = (self.rng.below(100), self.rng.chance(50));
        self.world.note(member, "program", format_args!("{share} percent, marks {is_mark}"));
        let mut touched = BTreeSet::new();
        for entry in kernel.entries(now) {
            if !self.rng.chance(share) {
                continue;
            }
            let given_s = 1 + self.rng.below(GIVEN_S) as u32;
            let mut marked = entry;
            marked.state.mark = self.rng.below(4) as u32;
            let State { timeout_s, status, .. } = entry.state;
            let _ = kernel.act(now, |table, now| match is_mark {
                true => table.update(now, By::Tool, &marked, timeout_s, status),
                false => table.set_timeout(now, By::Tool, &entry.original, given_s),
            });
            // (Who marks an entry writes what it has left in whole seconds: near its end that is
            // much.)
            if !is_mark || timeout_s <= 2 {
                touched.insert(entry.original);
                let left_s = if is_mark { timeout_s } else { given_s };
                let until = now.after(Duration::from_secs(left_s.into()));
                self.shortened.insert((entry.original, member), until);
            }
        }
        self.are_cut_at(member, &touched, false);
        for _ in 0..self.rng.below(4) {
            self.plant(member);
        }
        Ok(())
    }

    /// Another program creates an entry, perhaps with a helper, or with labels.
    fn plant(&mut self, member: MemberId) {
        let (now, kernel) = (self.world.now, self.kernel(member).expect("it lives"));
        let of = member as usize - 1;
        let has_helper = self.plan.has_helper[of] && self.rng.chance(40);
        let has_labels = self.plan.has_labels[of] && self.rng.chance(40);
        let port = self.rng.below(20) as u16;
        let server = if has_helper { 21 } else { 443 };
        let original =
            Tuple::v4(TCP, (Ipv4Addr::new(10, 9, 0, member), 20_000 + port), (SERVER, server));
        // No two members give away one port.
        let outside = 40_000 + 100 * member as u16 + port;
        let reply = match self.plan.nat {
            Some(_) => Tuple::v4(TCP, (SERVER, server), (VIP, outside)),
            None => original.mirrored(),
        };
        let state = State {
            tcp_state: tcp::ESTABLISHED,
            status: status::SEEN_REPLY | status::ASSURED,
            mark: self.rng.below(3) as u32,
            ..State::default()
        };
        let mut connection = Connection::new(original, reply, state);
        if has_helper {
            connection.extra.parts |= parts::HELPER;
            connection.extra.helper = FTP;
        }
        if has_labels {
            connection.extra.parts |= parts::LABELS;
            connection.extra.labels[0] = 1 + self.rng.below(255) as u8;
        }
        let given_s = 1 + self.rng.below(GIVEN_S);
        let done =
            kernel.act(now, |table, now| table.create(now, By::Tool, &connection, given_s as u32));
        self.world.note(member, "plants", format_args!("{original} for {given_s} s: {done:?}"));
        if done.is_ok() {
            self.numbers += 1;
            let until = now.after(Duration::from_secs(given_s));
            self.planted.retain(|planted| planted.connection.original != original);
            self.planted.push(Planted {
                number: self.numbers,
                connection,
                at: member,
                since: now,
                until,
            });
        }
    }

    /// Whatever was done is undone.
    pub(super) fn heal(&mut self) -> Result<(), Broken> {
        self.world.cut.clear();
        for member in 1..=self.plan.shards.len() as MemberId {
            if !self.kernels.borrow().contains_key(&member) {
                self.boot(member);
                self.start(member);
            }
        }
        self.world.note(0, "heal", format_args!(""));
        Ok(())
    }
}
