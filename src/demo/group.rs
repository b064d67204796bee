//! The group: three appliances, their memory and their load.

use std::time::Duration;

use super::figures::{Figures, sum};
use super::options::{DemoOptions, MEMBERS, SHARDS, SURVIVORS, VICTIM};
use super::process::{Appliance, Directory, Start};
use crate::clock;
use crate::counters::Counter;
use crate::group::view::{Member, Status};
use crate::load::flows::FlowsConfig;
use crate::load::{Load, interrupt};
use crate::shm::RegionView;
use crate::time::Time;

/// How long until the group must be complete.
const COMPLETE_WITHIN: Duration = Duration::from_secs(10);

/// How often the load tells what is due.
const BEAT: Duration = Duration::from_millis(2);

/// How often the demo looks whether its children live, and at conditions that it waits for.
const LOOK: Duration = Duration::from_millis(5);

/// How long the connections take to open.
const RAMP: Duration = Duration::from_secs(4);

/// Three appliances. The order of the fields is the order of their end.
pub struct Group {
    /// One load a member; empty until it begins.
    pub loads: Vec<Load>,
    /// The members' memory.
    pub views: Vec<RegionView>,
    /// The members.
    pub appliances: Vec<Appliance>,
    _dir: Directory,
}

impl Group {
    /// Starts the three and waits until each holds the two others for ready.
    ///
    /// # Errors
    /// One line that says what went wrong.
    pub fn start(options: &DemoOptions) -> Result<Group, String> {
        let dir =
            Directory::new(options.keep).map_err(|e| format!("cannot make a directory: {e}"))?;
        if options.keep {
            eprintln!("hypersync demo: the directory is {}", dir.path().display());
        }
        let mut more = Vec::new();
        for (option, value) in [("--send", &options.send), ("--features", &options.features)] {
            if let Some(value) = value {
                more.extend([option.to_owned(), value.clone()]);
            }
        }
        let mut group = Group { loads: vec![], views: vec![], appliances: vec![], _dir: dir };
        for (member, shards) in MEMBERS.into_iter().zip(SHARDS) {
            // In the end two members hold everything, and leases need room as well.
            let capacity = 2 * options.connections + 20_000;
            let start = Start { member, shards, capacity, dir: group._dir.path(), more: &more };
            let appliance = Appliance::start(&start)
                .map_err(|e| format!("cannot start member {member}: {e}"))?;
            group.appliances.push(appliance);
        }
        let begun = clock::now();
        while !group.look_for_views()? || !group.is_complete() {
            group.pause(LOOK)?;
            if clock::now().since(begun) > COMPLETE_WITHIN {
                return Err(format!("the group was not complete within {COMPLETE_WITHIN:?}"));
            }
        }
        Ok(group)
    }

    fn look_for_views(&mut self) -> Result<bool, String> {
        while self.views.len() < self.appliances.len() {
            match self.appliances[self.views.len()].try_view() {
                Ok(Some(view)) => self.views.push(view),
                Ok(None) => return Ok(false),
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(true)
    }

    fn is_complete(&self) -> bool {
        let sees = |viewer: usize, other: usize| {
            viewer == other || self.sees(viewer, other).is_some_and(|m| m.status == Status::Ready)
        };
        (0..MEMBERS.len()).all(|viewer| {
            (0..MEMBERS.len()).all(|other| sees(viewer, other)) && has_acted(&self.views[viewer])
        })
    }

    /// What one member's memory says of another.
    pub fn sees(&self, viewer: usize, other: usize) -> Option<Member> {
        self.views[viewer].group().read(MEMBERS[other])
    }

    /// Since when both survivors have held the victim for dead, if they do and every shard knows.
    pub fn detected(&self) -> Option<Time> {
        let dead = SURVIVORS.map(|viewer| {
            let member =
                self.sees(viewer, VICTIM).filter(|member| member.status == Status::Dead)?;
            has_acted(&self.views[viewer]).then_some(member.since)
        });
        Some(dead[0]?.max(dead[1]?))
    }

    /// A counter of both survivors.
    pub fn survivors(&self, counter: Counter) -> u64 {
        SURVIVORS.into_iter().map(|member| sum(&self.views[member], counter)).sum()
    }

    /// Begins a load on every member.
    ///
    /// # Errors
    /// A ring cannot be had.
    pub fn load(&mut self, options: &DemoOptions) -> Result<(), String> {
        let members = MEMBERS.len();
        let now = clock::now();
        for (i, appliance) in self.appliances.iter().enumerate() {
            let config = FlowsConfig {
                plane: MEMBERS[i],
                seed: options.seed,
                // One more: one is always being renewed.
                connections: options.connections.div_ceil(members) + 1,
                rate: options.rate.div_ceil(members as u32),
                ramp: RAMP,
                short_percent: 30,
                short_life: Duration::from_millis(500),
                nat_percent: 20,
                v6_percent: 10,
            };
            self.loads.push(Load::open(&appliance.shm, config, now).map_err(|e| e.to_string())?);
        }
        Ok(())
    }

    /// Tells the load's events as they come due until `is_done`, which is asked after every batch.
    ///
    /// # Errors
    /// An appliance ended, or the demo was interrupted.
    pub fn drive(&mut self, mut is_done: impl FnMut(&Group, Time) -> bool) -> Result<(), String> {
        let mut beat = clock::now();
        let mut looked = beat;
        loop {
            let now = clock::now();
            for load in &mut self.loads {
                load.batch(now);
            }
            if is_done(self, now) {
                return Ok(());
            }
            if now.since(looked) >= LOOK * 20 {
                looked = now;
                self.look_at_children()?;
            }
            // A beat that was missed is not made up for: the load does that by itself.
            beat = beat.after(BEAT).max(now);
            std::thread::sleep(beat.since(clock::now()));
        }
    }

    /// Kills the victim in the midst of its load; returns when.
    ///
    /// # Errors
    /// It was gone before.
    pub fn kill(&mut self) -> Result<Time, String> {
        let at = clock::now();
        self.appliances[VICTIM].kill().map_err(|e| format!("cannot kill the victim: {e}"))?;
        Ok(at)
    }

    /// Ends the load on the survivors: what is short-lived closes, the rest stays as it was last
    /// told.
    pub fn finish_load(&mut self) {
        for member in SURVIVORS {
            self.loads[member].flows.finish(true);
            self.loads[member].batch(clock::now());
        }
    }

    /// Tells what the end of the load left to tell; whether the survivors have read all of it.
    pub fn is_all_read(&mut self) -> bool {
        SURVIVORS.into_iter().all(|member| {
            let load = &mut self.loads[member];
            load.batch(clock::now());
            let told = load.flows.told().events();
            load.flows.is_finished() && sum(&self.views[member], Counter::SourceEvents) >= told
        })
    }

    /// Waits a moment.
    ///
    /// # Errors
    /// An appliance ended, or the demo was interrupted.
    pub fn pause(&mut self, span: Duration) -> Result<(), String> {
        std::thread::sleep(span);
        self.look_at_children()
    }

    fn look_at_children(&mut self) -> Result<(), String> {
        if interrupt::came() {
            return Err("interrupted".into());
        }
        let victim_is_dead = self.loads.iter().any(|load| load.flows.is_finishing());
        for (i, appliance) in self.appliances.iter_mut().enumerate() {
            if let Some(words) = appliance.ended().filter(|_| i != VICTIM || !victim_is_dead) {
                return Err(words);
            }
        }
        Ok(())
    }

    /// Events told so far.
    pub fn events(&self) -> u64 {
        self.loads.iter().map(|load| load.flows.told().events()).sum()
    }

    /// Connections open now.
    pub fn open(&self) -> u64 {
        self.loads.iter().map(|load| load.flows.open().count() as u64).sum()
    }

    /// Every counter of interest, now.
    pub fn figures(&self) -> Figures {
        Figures::of(&self.views, self.events(), clock::now())
    }
}

/// Whether every shard has acted on what the member knows of the group.
fn has_acted(view: &RegionView) -> bool {
    let version = view.group().version();
    (0..view.header().sizes.shards).all(|shard| view.group().shard(shard).view_version() >= version)
}
