//! Larger models and long histories, states at random: `CRASH_STATES` of them (1,000,000), from `CRASH_SEED` (1) on.
//!
//! A seed is a model and a history of syncs, rollbacks and adoptions, some of which meet a full disk, an I/O error or a
//! read-only file system, some crash, and some crash again in recovery. Some come by a handle that has just synced, or
//! failed to, or undone what a crash left. Reads and writes are cut short at random. A run goes on from what one of the
//! crashes left, or from where it was.

use std::env;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use checkpoint::Checkpoint;

use crate::check::{Outcomes, Scene, in_parallel, log_around};
use crate::common::Rng;
use crate::disk::{Fault, Faults, SimulatedDisk};
use crate::image::Image;
use crate::medium::{Medium, Op};
use crate::states;
use crate::world::{History, Shape, Step, World, is_uncertain, options};

/// One seed in this many compares and writes on several threads. Its log is another one each time, so such a seed may have to
/// be run again and again until it fails as it did.
const SEVERAL_THREADS: u64 = 8;

/// States that are drawn for each step.
const DRAWN: usize = 150;

fn shape(rng: &mut Rng) -> Shape {
    let shards = 1 + rng.below(3);
    // A few models have tensors of several chunks.
    let large = rng.below(60) == 0;
    let tensor = |i: usize, rng: &mut Rng| {
        let dtype = ["BF16", "BF16", "F16", "F32", "U8"][rng.below(5)];
        let elements = match rng.below(4) {
            _ if large && i == 0 => 700_000 + rng.below(900_000),
            0 => 1 + rng.below(300),
            1 => 256 * (1 + rng.below(16)),
            _ => 1 + rng.below(12_000),
        };
        (dtype, elements, if i < shards { i } else { rng.below(shards) })
    };
    let tensors = (0..shards + rng.below(4)).map(|i| tensor(i, rng)).collect();
    let multiple = [1, 512, 4096][rng.below(3)];
    Shape {
        tensors,
        align: (multiple, [0, rng.below(multiple)][rng.below(2)]),
        state: [0, 1, 700, 10_000][rng.below(4)],
        rarity: [1, 3, 50, 2000, 100_000][rng.below(5)],
        options: options(rng.below(4) as u64, [1, 5000, 60_000, 1 << 25][rng.below(4)]),
    }
}

fn fault(rng: &mut Rng) -> (Fault, u64) {
    let fault = Fault::ALL[rng.below(Fault::ALL.len())];
    let most = [3, 12, 60][rng.below(3)];
    (fault, rng.below(most) as u64)
}

/// One history.
struct Run {
    rng: Rng,
    history: History,
    disk: SimulatedDisk,
    /// The medium as it was when this step began, and how long the log was then.
    medium: Medium,
    began: usize,
    states: u64,
}

/// Where the step stands: which generations a crash may leave at a position of the log.
struct Allowed {
    old: u64,
    new: u64,
    started: usize,
    returned: usize,
    at_return: Vec<u64>,
    end: usize,
    at_end: u64,
}

impl Allowed {
    fn at(&self, position: usize) -> Vec<u64> {
        match position {
            _ if position >= self.end => vec![self.at_end],
            _ if position >= self.returned => self.at_return.clone(),
            _ if position <= self.started => vec![self.old],
            _ => vec![self.old, self.new],
        }
    }
}

impl Run {
    fn new(seed: u64) -> Run {
        let mut rng = Rng(seed);
        let mut shape = shape(&mut rng);
        if seed.is_multiple_of(SEVERAL_THREADS) {
            shape.options.threads = 2;
        }
        let scene = Scene::fresh(History::new(World::new(seed, shape))).after(&[Step::Open]);
        let disk = SimulatedDisk::recording(&scene.image);
        let medium = Medium::new(&scene.image, true);
        Run { rng, history: scene.history, disk, medium, began: 0, states: 0 }
    }

    fn restart_from(&mut self, image: &Image) {
        self.disk = SimulatedDisk::recording(image);
        self.medium = Medium::new(image, true);
        self.began = 0;
    }

    /// A handle that has just synced, or failed to, and whose names no opener has made durable since.
    fn used(&mut self) -> Result<Checkpoint, String> {
        let step = Step::Sync(self.rng.below(3) as u64);
        let fail = (self.rng.below(3) == 0).then(|| fault(&mut self.rng));
        let next = self.history.next(step).expect("a sync makes one");
        let open = |disk| self.history.world.open(disk).map_err(|error| format!("open: {error}"));
        let mut checkpoint = open(&self.disk)?;
        self.disk.set_faults(Faults { short: None, fail });
        let synced = self.history.run(&mut checkpoint, step);
        self.disk.set_faults(Faults::default());
        match synced {
            Err(error) if fail.is_none() => return Err(format!("{step:?} without faults: {error}")),
            Err(_) if checkpoint.unusable().is_some() => {
                drop(checkpoint);
                checkpoint = open(&self.disk)?;
            }
            _ => {}
        }
        if checkpoint.current().generation == next.generation {
            self.history.advance(next);
        }
        self.catch_up();
        Ok(checkpoint)
    }

    /// The medium follows the log to its end.
    fn catch_up(&mut self) {
        let log = self.disk.log();
        log[self.began..].iter().for_each(|op| self.medium.apply(op));
        self.began = log.len();
    }

    /// A step that is possible on a disk that is at rest.
    fn choose(&mut self, disk: &SimulatedDisk) -> Step {
        let checkpoint = self.history.world.open(disk).expect("it is whole");
        let all = checkpoint.generations().expect("they can be read").into_iter();
        let restorable: Vec<u64> = all.filter(|known| known.restorable).map(|known| known.generation).collect();
        match self.rng.below(8) {
            0 | 1 => Step::Rollback(restorable[self.rng.below(restorable.len())]),
            2 => Step::Adopt,
            _ => Step::Sync(self.rng.below(3) as u64),
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let held = (self.rng.below(3) == 0).then(|| self.used()).transpose()?;
        let at_rest = SimulatedDisk::new(&self.disk.live());
        let step = self.choose(&at_rest);
        let before = at_rest.live();
        let mut before_it = None;
        if step == Step::Adopt && held.is_none() && self.rng.below(2) == 0 {
            let mut image = before.clone();
            before_it = Some(self.history.now().clone());
            self.history.meddle(&mut image, &mut self.rng);
            self.restart_from(&image);
        }
        let short = (self.rng.below(2) == 0).then(|| self.rng.next());
        let fail = (self.rng.below(3) == 0).then(|| fault(&mut self.rng));
        self.disk.set_faults(Faults { short, fail });
        let mut started = self.disk.len();
        let opened = held.map_or_else(|| self.history.world.open(&self.disk), Ok);
        // What could not be removed is left over.
        let mut whole = true;
        let result = opened.and_then(|mut checkpoint| {
            started = self.disk.len();
            let result = self.history.run(&mut checkpoint, step);
            whole = checkpoint.take_warnings().is_empty();
            result
        });
        let returned = self.disk.len();
        self.disk.set_faults(Faults { short, fail: None });
        let after = self.disk.live();
        let mut outcomes = Outcomes::new(&self.history, step, &before, (result.is_ok() && whole).then_some(&after));
        outcomes.short = short;
        let (old, new) = (outcomes.old(), outcomes.new_or_old());
        let at_return = match &result {
            Ok(()) => vec![new],
            Err(error) if is_uncertain(error) => vec![old, new],
            Err(_) => vec![old],
        };
        let told = match &result {
            Ok(()) => "it succeeded".into(),
            Err(error) => format!("it failed: {error}"),
        };
        let context = |error: String, log: &[Op]| {
            format!(
                "{step:?} from generation {old} with {short:?} {fail:?}; {told}\n{error}\n{}",
                log_around(log, log.len())
            )
        };
        // The process is started again, without a crash.
        let at_end = outcomes.open(&self.disk).map_err(|error| context(error, &self.disk.log()))?;
        if !at_return.contains(&at_end) {
            return Err(context(format!("opened again it is generation {at_end}"), &self.disk.log()));
        }
        let log = self.disk.log();
        let allowed = Allowed { old, new, started, returned, at_return, end: log.len(), at_end };
        let from = self.draw(&mut outcomes, &log, &allowed).map_err(|error| context(error, &[]))?;
        let go_on_from_crash = self.rng.below(3) == 0;
        let is = match from.filter(|_| go_on_from_crash) {
            Some(image) if before_it.is_none() && self.rng.below(2) == 0 => {
                // The handle that recovers does the next step too.
                self.restart_from(&image);
                outcomes.recover(&image, false).map_err(|error| context(error, &[]))?.0
            }
            Some(image) => {
                self.restart_from(&image);
                outcomes.open(&self.disk).map_err(|error| context(error, &self.disk.log()))?
            }
            None => at_end,
        };
        if is == new && new != old {
            self.history.advance(outcomes.known(new).clone());
        }
        if let Some(known) = before_it.filter(|_| is == old) {
            // It was not adopted: somebody puts the file back.
            let mut image = self.disk.live();
            self.history.put_back(&mut image, known);
            self.restart_from(&image);
        }
        self.catch_up();
        Ok(())
    }

    /// Draws states of the step's log and opens each. Gives one of them.
    fn draw(&mut self, outcomes: &mut Outcomes, log: &[Op], allowed: &Allowed) -> Result<Option<Image>, String> {
        let end = log.len();
        let mut positions: Vec<usize> = (0..DRAWN).map(|_| self.began + self.rng.below(end + 1 - self.began)).collect();
        positions.sort_unstable();
        let (mut medium, mut at, mut chosen) = (self.medium.clone(), self.began, None);
        for position in positions {
            log[at..position].iter().for_each(|op| medium.apply(op));
            at = position;
            let choices = medium.choices();
            let pick = states::random(&choices, true, &mut self.rng);
            let image = medium.image(&choices, &pick);
            let context = |error: String| crate::check::report(&error, &medium, &choices, &pick, log, position);
            self.states += 1;
            let twice = self.rng.below(10) == 0;
            let (is, disk) = outcomes.recover(&image, twice).map_err(context)?;
            if !allowed.at(position).contains(&is) {
                return Err(context(format!("the crash left generation {is}, not {:?}", allowed.at(position))));
            }
            if twice {
                let fail = (self.rng.below(2) == 0).then(|| fault(&mut self.rng));
                let disk = match fail {
                    None => disk,
                    Some(_) => self.failing_recovery(outcomes, &image, fail, allowed).map_err(context)?,
                };
                self.again(outcomes, &image, &disk.log(), allowed).map_err(context)?;
            }
            if chosen.is_none() || self.rng.below(20) == 0 {
                chosen = Some(image);
            }
        }
        Ok(chosen)
    }

    /// A recovery that meets a fault, and the next one, which does not.
    fn failing_recovery(
        &mut self,
        outcomes: &mut Outcomes,
        image: &Image,
        fail: Option<(Fault, u64)>,
        allowed: &Allowed,
    ) -> Result<SimulatedDisk, String> {
        let disk = SimulatedDisk::with(image, true, Faults { short: outcomes.short, fail });
        let _ = self.history.world.open(&disk);
        disk.set_faults(Faults::default());
        let is = outcomes.open(&disk).map_err(|error| format!("{error}\nafter a recovery with {fail:?}"))?;
        match [allowed.old, allowed.new].contains(&is) {
            true => Ok(disk),
            false => Err(format!("after a recovery with {fail:?} it is generation {is}")),
        }
    }

    /// Draws states of a recovery's log.
    fn again(&mut self, outcomes: &mut Outcomes, image: &Image, log: &[Op], allowed: &Allowed) -> Result<(), String> {
        let mut positions: Vec<usize> = (0..8).map(|_| self.rng.below(log.len() + 1)).collect();
        positions.sort_unstable();
        let (mut medium, mut at) = (Medium::new(image, true), 0);
        for position in positions {
            log[at..position].iter().for_each(|op| medium.apply(op));
            at = position;
            let choices = medium.choices();
            let pick = states::random(&choices, true, &mut self.rng);
            let image = medium.image(&choices, &pick);
            let context = |error: String| {
                let error = crate::check::report(&error, &medium, &choices, &pick, log, position);
                format!("{error}\nand before that, a crash:")
            };
            self.states += 1;
            let (is, _) = outcomes.recover(&image, false).map_err(context)?;
            if ![allowed.old, allowed.new].contains(&is) {
                return Err(context(format!("the second crash left generation {is}")));
            }
        }
        Ok(())
    }
}

fn number(name: &str, default: u64) -> u64 {
    env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

#[test]
fn a_million_random_states_are_one_whole_generation() {
    let (want, first) = (number("CRASH_STATES", 1_000_000), number("CRASH_SEED", 1));
    println!("CRASH_STATES={want} CRASH_SEED={first}");
    let began = Instant::now();
    let (states, seeds) = (AtomicU64::new(0), AtomicU64::new(0));
    let run = |seed: u64| {
        if states.load(Ordering::Relaxed) >= want {
            return Ok(());
        }
        let mut run = Run::new(seed);
        let steps = 2 + run.rng.below(6);
        for _ in 0..steps {
            run.step().map_err(|error| format!("CRASH_SEED={seed}: {error}"))?;
        }
        states.fetch_add(run.states, Ordering::Relaxed);
        seeds.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    // A seed is hundreds of states.
    if let Err(error) = in_parallel((first..first + want / 100 + 1).collect(), run) {
        panic!("{error}");
    }
    let (states, took) = (states.into_inner(), began.elapsed());
    println!("{states} states of {} seeds, {:.0} a second", seeds.into_inner(), states as f64 / took.as_secs_f64());
    assert!(states >= want);
}
