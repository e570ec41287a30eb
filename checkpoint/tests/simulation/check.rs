//! What must hold after a crash, and how it is checked fast: the directory that recovery leaves is hashed, and only one
//! that was not seen before is examined in full.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::choices::{Choices, Pick};
use crate::disk::{Faults, SimulatedDisk, model_dir};
use crate::image::Image;
use crate::medium::{Medium, Op};
use crate::states;
use crate::world::{History, Known, Step, expect_known};

/// Where the process id stands: the one file whose content means nothing.
pub fn lock() -> PathBuf {
    model_dir().join(".apollod/lock")
}

/// The generations that a step leads from and to, with the directories that a run without crashes leaves.
pub struct Outcomes {
    history: History,
    outcomes: Vec<Outcome>,
    /// Directories that were examined, by generation.
    good: BTreeMap<[u8; 32], u64>,
    /// States that were visited, with the generation that each became.
    pub visited: BTreeMap<[u8; 32], u64>,
    pub states: u64,
    /// A seed that cuts reads and writes short.
    pub short: Option<u64>,
}

struct Outcome {
    known: Known,
    /// Names below the model's folder in a run without crashes; none where the run ended in an error.
    names: Option<BTreeSet<PathBuf>>,
}

fn names(image: &Image) -> BTreeSet<PathBuf> {
    image.names.keys().map(|path| path.path().to_path_buf()).filter(|path| *path != lock()).collect()
}

impl Outcomes {
    /// `history` and `old` are as before the step; `new` is the directory after it, if it came to its end.
    pub fn new(history: &History, step: Step, old: &Image, new: Option<&Image>) -> Outcomes {
        let mut outcomes = vec![Outcome { known: history.now().clone(), names: Some(names(old)) }];
        if let Some(known) = history.next(step) {
            outcomes.push(Outcome { known, names: new.map(names) });
        }
        let (good, visited) = (BTreeMap::new(), BTreeMap::new());
        Outcomes { history: history.clone(), outcomes, good, visited, states: 0, short: None }
    }

    /// The number of the generation before the step, and of the one after.
    pub fn old(&self) -> u64 {
        self.outcomes[0].known.generation
    }

    pub fn new_or_old(&self) -> u64 {
        self.outcomes[self.outcomes.len() - 1].known.generation
    }

    pub fn known(&self, generation: u64) -> &Known {
        let of = |outcome: &&Outcome| outcome.known.generation == generation;
        &self.outcomes.iter().find(of).expect("an outcome").known
    }

    /// Opens a state. Gives the generation that it is now, and the disk with the log of how.
    pub fn recover(&mut self, image: &Image, record: bool) -> Result<(u64, SimulatedDisk), String> {
        self.states += 1;
        let short = self.short.map(|seed| seed ^ self.states);
        let disk = SimulatedDisk::with(image, record, Faults { short, fail: None });
        let generation = self.open(&disk)?;
        Ok((generation, disk))
    }

    /// Opens a disk as it is, and examines what it became.
    pub fn open(&mut self, disk: &SimulatedDisk) -> Result<u64, String> {
        let checkpoint = self.history.world.open(disk).map_err(|error| format!("open: {error}"))?;
        let generation = checkpoint.current().generation;
        drop(checkpoint);
        let image = disk.live();
        let hash = image.hash(Some(&lock()));
        match self.good.get(&hash) {
            Some(good) if *good == generation => {}
            _ => {
                self.examine(&image, generation).map_err(|error| format!("generation {generation}: {error}"))?;
                self.good.insert(hash, generation);
            }
        }
        Ok(generation)
    }

    /// Everything that must hold of a directory that was opened without an error.
    fn examine(&self, image: &Image, generation: u64) -> Result<(), String> {
        let outcome = self.outcomes.iter().find(|outcome| outcome.known.generation == generation);
        let outcome = outcome.ok_or("there is no such generation")?;
        let world = &self.history.world;
        let known = &outcome.known;
        if let Some(want) = &outcome.names {
            let is = names(image);
            if let Some(name) = is.symmetric_difference(want).next() {
                return Err(format!(
                    "{} is {}",
                    name.display(),
                    if want.contains(name) { "missing" } else { "left over" }
                ));
            }
        }
        let disk = SimulatedDisk::new(image);
        let checkpoint = world.open(&disk).map_err(|error| format!("open again: {error}"))?;
        if checkpoint.current().generation != generation || disk.live().hash(Some(&lock())) != image.hash(Some(&lock()))
        {
            return Err(format!("a second open makes something else of it: {checkpoint}"));
        }
        expect_known(world, &checkpoint, &disk, known)?;
        let all = checkpoint.generations().map_err(|error| format!("generations: {error}"))?;
        drop(checkpoint);
        for to in all.iter().filter(|listed| listed.restorable).map(|listed| listed.generation) {
            let target = if to == generation { known } else { &self.history.known[&to] };
            self.rollback(image, known, target).map_err(|error| format!("rollback to {to}: {error}"))?;
        }
        self.replay(image, known).map_err(|error| format!("replay: {error}"))
    }

    /// A generation that is said to be restorable is.
    fn rollback(&self, image: &Image, known: &Known, target: &Known) -> Result<(), String> {
        let world = &self.history.world;
        let disk = SimulatedDisk::new(image);
        let mut checkpoint = world.open(&disk).map_err(|error| error.to_string())?;
        match (checkpoint.rollback(target.generation), known.clean) {
            (Ok(_), true) => expect_known(world, &checkpoint, &disk, &Known { clean: true, ..target.clone() }),
            (Err(_), false) => Ok(()),
            // What somebody changed may stay, and is still told.
            (Ok(_), false) => match checkpoint.verify() {
                Ok(report) if report.is_ok() => Err("it made the truth of what somebody changed".into()),
                _ => Ok(()),
            },
            (Err(error), true) => Err(error.to_string()),
        }
    }

    /// What was acknowledged and is not in the files is trained again, once, and synced.
    fn replay(&self, image: &Image, known: &Known) -> Result<(), String> {
        let world = &self.history.world;
        if !known.clean || !known.replayable {
            return Ok(());
        }
        let acknowledged = self.outcomes.iter().map(|outcome| outcome.known.progress.cursor).max().unwrap_or(0) + 1;
        let (mut once, mut weights) = (world.base.clone(), known.weights.clone());
        world.train(&mut once, 1..=acknowledged);
        world.train(&mut weights, known.progress.cursor + 1..=acknowledged);
        if once != weights {
            return Err(format!("the cursor {} does not fit the weights", known.progress.cursor));
        }
        let mut history = self.history.clone();
        history.known.insert(known.generation, known.clone());
        history.current = known.generation;
        let step = Step::Sync(acknowledged - known.progress.cursor);
        let disk = SimulatedDisk::new(image);
        let mut checkpoint = world.open(&disk).map_err(|error| error.to_string())?;
        history.run(&mut checkpoint, step).map_err(|error| error.to_string())?;
        expect_known(world, &checkpoint, &disk, &history.next(step).expect("a sync makes one"))
    }
}

/// The end of a log as text, with a mark at a position.
pub fn log_around(log: &[Op], position: usize) -> String {
    let from = position.saturating_sub(60);
    let line = |(i, op): (usize, &Op)| format!("  {}{i}: {op}\n", if i == position { "--- crash ---\n  " } else { "" });
    let mut text: String = log.iter().enumerate().skip(from).take(position + 6 - from).map(line).collect();
    if position == log.len() {
        text.push_str("  --- crash ---\n");
    }
    text
}

/// A violation with everything needed to see it again.
pub fn report(error: &str, medium: &Medium, choices: &Choices, pick: &Pick, log: &[Op], position: usize) -> String {
    let state = medium.describe(choices, pick);
    format!("{error}\noperations:\n{}state after the crash:\n{state}", log_around(log, position))
}

/// Sets what is not worth visiting: the lock's content.
pub fn without_lock(mut choices: Choices, medium: &Medium) -> Choices {
    let lock = medium.node(&lock());
    choices.files.retain(|file| Some(crate::image::Node::File(file.file)) != lock);
    choices
}

/// Calls `visit` with every position of `log` from `start` on that is worth it, and the medium there.
pub fn each_position(
    mut medium: Medium,
    log: &[Op],
    start: usize,
    visit: &mut dyn FnMut(usize, &Medium) -> Result<(), String>,
) -> Result<(), String> {
    let mut at = 0;
    for position in states::positions(log).into_iter().filter(|position| *position >= start) {
        log[at..position].iter().for_each(|op| medium.apply(op));
        at = position;
        visit(position, &medium)?;
    }
    Ok(())
}

/// Runs jobs on as many threads as the machine has cores; the first error ends it.
pub fn in_parallel<Job: Send>(jobs: Vec<Job>, run: impl Fn(Job) -> Result<(), String> + Sync) -> Result<(), String> {
    let jobs = std::sync::Mutex::new(jobs.into_iter());
    let failed = std::sync::Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let job = jobs.lock().unwrap().next();
                    let Some(job) = job.filter(|_| failed.lock().unwrap().is_none()) else { return };
                    if let Err(error) = run(job) {
                        failed.lock().unwrap().get_or_insert(error);
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// For tests of one step: the image, the history, and what they are after it.
#[derive(Clone)]
pub struct Scene {
    pub history: History,
    pub image: Image,
}

impl Scene {
    /// A model that was never opened.
    pub fn fresh(history: History) -> Scene {
        let image = history.world.image();
        Scene { history, image }
    }

    /// Does steps, all of which succeed.
    pub fn after(mut self, steps: &[Step]) -> Scene {
        for step in steps {
            let disk = SimulatedDisk::new(&self.image);
            let mut checkpoint = self.history.world.open(&disk).unwrap();
            self.history.run(&mut checkpoint, *step).unwrap();
            drop(checkpoint);
            self.image = disk.live();
            if let Some(next) = self.history.next(*step) {
                self.history.advance(next);
            }
        }
        self
    }
}
