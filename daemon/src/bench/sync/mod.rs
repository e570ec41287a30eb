//! `apollod bench sync`: a sync of weights that training moved, beside what else could bring them to the disk.
//!
//! Sync and peers take turns, so that a slower minute of the disk falls on all of them. Before each, what it reads is
//! read once and `sync(2)` empties the queue: files are in the page cache for all, and nobody waits for pages that
//! another made dirty. After each, the files are compared with the weights, byte for byte.

mod peers;
mod report;
mod weights;

use anyhow::{Context, Result, ensure};
use checkpoint::{Checkpoint, Keep, Progress, SyncReport};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::config::Moments;
use compute::Dtype;
use peers::Rsync;
use weights::{Rng, SIDES, Weights};

pub use weights::Pattern;

/// Generations of history, which bound the room that is needed.
const KEPT: u64 = 4;

/// What `apollod bench sync` is told.
pub struct Options {
    /// Size of the model.
    pub gib: f64,
    /// Share of it that training moves between two syncs.
    pub dirty: f64,
    /// Which parts of it those are.
    pub pattern: Pattern,
    /// Rank of the optimizer, which decides how large its state is.
    pub rank: usize,
    /// And what its moments are stored in.
    pub moments: Moments,
    /// Runs of the sync and of the saves.
    pub runs: usize,
    /// How many of them rsync takes part in.
    pub rsync_runs: usize,
    /// Where the files are made.
    pub dir: PathBuf,
    /// Of everything that is drawn.
    pub seed: u64,
    /// One line of JSON instead of a table.
    pub json: bool,
}

impl Options {
    /// What the state's moments are: `auto` is what a CPU stores.
    fn moments(&self) -> Dtype {
        match self.moments {
            Moments::F32 => Dtype::F32,
            Moments::Auto | Moments::Bf16 => Dtype::BF16,
        }
    }

    /// Bytes of the state if everything has changed.
    fn state_bytes(&self, weights: &Weights) -> u64 {
        weights.moments(self.rank) * self.moments().size() as u64
    }
}

/// Runs the benchmark and prints it.
pub fn sync(options: &Options) -> Result<()> {
    let machine = report::machine(&options.dir);
    let figures = measure(options, "rsync")?;
    match options.json {
        true => println!("{}", report::json(options, &figures, &machine)),
        false => print!("{}", report::table(options, &figures, &machine)),
    }
    Ok(())
}

/// What was measured, in seconds and bytes.
struct Figures {
    weights: u64,
    sync: Vec<f64>,
    /// Of the last sync.
    report: SyncReport,
    save_new: Vec<f64>,
    save_over: Vec<f64>,
    /// None if there is no rsync; empty if it was not asked for.
    rsync: Option<Copies>,
}

/// What rsync took.
#[derive(Default)]
struct Copies {
    seconds: Vec<f64>,
    /// That the last one wrote.
    bytes: u64,
}

impl Figures {
    /// The median of the sync over that of the better peer.
    fn ratio(&self) -> f64 {
        let rsync = self.rsync.iter().map(|rsync| &rsync.seconds).filter(|seconds| !seconds.is_empty());
        let peers = [&self.save_new, &self.save_over].into_iter().chain(rsync);
        median(&self.sync) / peers.map(|seconds| median(seconds)).fold(f64::INFINITY, f64::min)
    }
}

fn median(values: &[f64]) -> f64 {
    super::quartiles(values).0
}

/// Every turn, in a folder that is removed at the end.
fn measure(options: &Options, rsync: &str) -> Result<Figures> {
    let Options { gib, dirty, runs, .. } = *options;
    ensure!(gib > 0.0 && gib.is_finite(), "--gib {gib}: want a size above 0");
    ensure!(dirty > 0.0 && dirty <= 1.0, "--dirty {dirty}: want a share above 0 and at most 1");
    ensure!(runs > 0, "--runs 0: want 1 at least");
    let rsync = Rsync::find(rsync)?;
    check_room(options)?;

    eprintln!("making {gib} GiB of weights, seed {}", options.seed);
    let mut weights = Weights::new((gib * (1u64 << 30) as f64) as u64, options.seed);
    let scratch = Scratch::new(&options.dir)?;
    let (model, saved) = (scratch.folder("model")?, scratch.folder("saved")?);
    for dir in [&model, &saved] {
        peers::save(&weights, dir)?;
        fs::write(dir.join("model.safetensors.index.json"), weights.index().to_string())?;
    }
    weights.locate(&model)?;
    let keep = Keep { generations: KEPT, ..Keep::default() };
    let (mut checkpoint, _) = Checkpoint::open_with(&model, checkpoint::Options { keep, ..Default::default() })?;

    // As the trainer says at its start, when it has compared the files with what the server holds.
    checkpoint.assume_equal(&weights);

    let (mut synced, mut save_new, mut save_over) = (Vec::new(), Vec::new(), Vec::new());
    let mut copies = rsync.as_ref().map(|_| Copies::default());
    let mut report = None;
    for run in 1..=runs as u64 {
        let moved = weights.draw(run, dirty, options.pattern);
        eprintln!("run {run} of {runs}: a step moves {} blocks", moved.blocks);
        weights.step(run, &moved);
        let share = moved.bytes as f64 / weights.bytes() as f64;
        let state = random_bytes((options.state_bytes(&weights) as f64 * share) as usize, options.seed, run);

        settle(&weights, &[&model])?;
        let clock = Instant::now();
        let progress = Progress { cursor: run, step: run, examples: run, ..Progress::default() };
        let done = checkpoint.sync(&weights, &mut |out| out.write_all(&state), progress, &mut |_, _| {})?;
        took("sync", clock, &mut synced);
        drop(state);
        weights.check(&model).context("after the sync")?;
        report = Some(done);

        if let (Some(rsync), Some(copies)) = (&rsync, &mut copies)
            && run <= options.rsync_runs as u64
        {
            settle(&weights, &[&model, &saved])?;
            let clock = Instant::now();
            copies.bytes = rsync.copy(&weights, &model, &saved)?;
            took("rsync", clock, &mut copies.seconds);
            weights.check(&saved).context("after rsync")?;
        }
        for shard in &weights.shards {
            fs::remove_file(saved.join(&shard.file))?;
        }
        settle(&weights, &[])?;
        let clock = Instant::now();
        peers::save(&weights, &saved)?;
        took("safetensors, new files", clock, &mut save_new);
        settle(&weights, &[&saved])?;
        let clock = Instant::now();
        peers::save(&weights, &saved)?;
        took("safetensors, over existing files", clock, &mut save_over);
        weights.check(&saved).context("after the save")?;
    }
    let report = report.context("no run")?;
    Ok(Figures { weights: weights.bytes(), sync: synced, report, save_new, save_over, rsync: copies })
}

/// Notes a time and tells it.
fn took(what: &str, clock: Instant, times: &mut Vec<f64>) {
    let seconds = clock.elapsed().as_secs_f64();
    eprintln!("  {what}: {seconds:.2} s");
    times.push(seconds);
}

/// Reads the files of these folders, and waits until nothing is left to be written.
fn settle(weights: &Weights, dirs: &[&PathBuf]) -> Result<()> {
    for path in dirs.iter().flat_map(|dir| weights.shards.iter().map(|shard| dir.join(&shard.file))) {
        let mut file = fs::File::open(&path).with_context(|| format!("open {}", path.display()))?;
        io::copy(&mut file, &mut Discard).with_context(|| format!("read {}", path.display()))?;
    }
    rustix::fs::sync();
    Ok(())
}

/// Takes everything and keeps nothing. (Between a file and `io::sink` the kernel would copy by reference, unread.)
struct Discard;

impl io::Write for Discard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What no compression makes smaller.
fn random_bytes(n: usize, seed: u64, run: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed, run, usize::MAX - 1);
    let mut bytes: Vec<u8> = Vec::with_capacity(n.next_multiple_of(8));
    while bytes.len() < n {
        bytes.extend_from_slice(&rng.bits().to_le_bytes());
    }
    bytes.truncate(n);
    bytes
}

/// Refuses what the disk or the memory cannot hold, and says how much it is.
fn check_room(options: &Options) -> Result<()> {
    let dir = &options.dir;
    let weights = options.gib * (1u64 << 30) as f64;
    // Two moments of rank·n for n² weights, in those matrices of which they are the largest part: the small ones.
    let share = (2 * options.moments().size()) as f64 * options.rank.min(SIDES[1]) as f64 / (2 * SIDES[1]) as f64;
    let state = options.dirty * weights * share;
    let kept = options.runs.min(KEPT as usize + 1) as f64;
    // A journal was 0.2 of what it changes, and sums, old and new, are a 256th of the weights.
    let need = 2.0 * weights + kept * (state + 0.4 * options.dirty * weights) + weights / 256.0;
    let stat = rustix::fs::statvfs(dir).with_context(|| format!("the file system of {}", dir.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) as f64;
    let (need_gb, free_gb) = (need / 1e9, free / 1e9);
    eprintln!("needs up to {need_gb:.2} GB of disk in {} ({free_gb:.2} GB are free)", dir.display());
    ensure!(free >= need, "{}: {need_gb:.2} GB are needed and {free_gb:.2} GB are free; see --dir", dir.display());
    let memory = weights + state;
    if let Some(available) = report::meminfo("MemAvailable") {
        let (memory_gb, available_gb) = (memory / 1e9, available as f64 / 1e9);
        ensure!(available as f64 >= memory, "{memory_gb:.2} GB of memory are needed and {available_gb:.2} are there");
        if (available as f64) < memory + 2.0 * weights {
            eprintln!("{available_gb:.2} GB of memory do not keep all files in the page cache");
        }
    }
    Ok(())
}

/// A folder that goes with this value, however that ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path) -> Result<Scratch> {
        let path = dir.join(format!("apollod-bench-sync-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Scratch(path))
    }

    fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} could not be removed: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path, dirty: f64, pattern: Pattern) -> Options {
        let dir = dir.to_path_buf();
        Options {
            gib: 0.01,
            dirty,
            pattern,
            rank: 64,
            moments: Moments::Auto,
            runs: 2,
            rsync_runs: 1,
            dir,
            seed: 1,
            json: true,
        }
    }

    #[test]
    fn a_small_run_measures_everyone_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path(), 0.1, Pattern::Blocks);
        let figures = measure(&options, "rsync").unwrap();
        // Six matrices of 2 MiB, each in 513 blocks.
        assert_eq!(figures.weights, 6 << 21);
        assert_eq!(figures.report.blocks_total, 6 * 513);
        assert!((308 - 12..=308).contains(&figures.report.blocks_changed), "{:?}", figures.report);
        let share = figures.report.bytes_written as f64 / figures.weights as f64;
        assert!((share - 0.1).abs() < 0.005, "{share}");
        // Two moments of 64 x 1024 in bf16 for each matrix, and a tenth of that.
        let state = figures.report.bytes_state as f64 / (6 * 4 * 64 * 1024) as f64;
        assert!((state - 0.1).abs() < 0.005, "{state}");
        assert!(figures.report.bytes_sums > 0);
        assert_eq!((figures.sync.len(), figures.save_new.len(), figures.save_over.len()), (2, 2, 2));
        if let Some(rsync) = &figures.rsync {
            assert_eq!(rsync.seconds.len(), 1);
            assert!(rsync.bytes >= figures.weights / 20, "{}", rsync.bytes);
        }
        let line = report::json(&options, &figures, &report::machine(dir.path()));
        assert_eq!(line["target"]["times_faster_min"], 4.0);
        assert_eq!(line["sync"]["written_bytes"]["in_place"], figures.report.bytes_written);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn without_rsync_it_is_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { runs: 1, moments: Moments::F32, ..options(dir.path(), 1.0, Pattern::Tensors) };
        let figures = measure(&options, "no-such-rsync").unwrap();
        assert!(figures.rsync.is_none());
        assert_eq!(figures.report.bytes_state, 6 * 8 * 64 * 1024);
        let line = report::json(&options, &figures, &report::machine(dir.path()));
        assert_eq!(line["rsync"]["absent"], "not installed");
        assert_eq!(line["target"]["time_over_better_peer_max"], 1.4);
    }

    #[test]
    fn an_error_leaves_nothing_either() {
        let dir = tempfile::tempdir().unwrap();
        let error = measure(&options(dir.path(), 0.1, Pattern::Blocks), "false").err().unwrap().to_string();
        assert!(error.contains("false failed: exit status: 1"), "{error}");
        let large = Options { gib: 1e6, ..options(dir.path(), 0.1, Pattern::Blocks) };
        let error = measure(&large, "rsync").err().unwrap().to_string();
        assert!(error.contains("GB are needed"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_better_peer_counts() {
        let report = SyncReport {
            generation: 1,
            blocks_total: 0,
            blocks_changed: 0,
            bytes_journal: 0,
            bytes_written: 0,
            bytes_state: 0,
            bytes_sums: 0,
            seconds: 0.0,
            unchanged: false,
        };
        let (sync, save_new, save_over) = (vec![1.0, 9.0, 2.0], vec![10.0], vec![8.0, 4.0]);
        let mut figures = Figures { weights: 0, sync, report, save_new, save_over, rsync: None };
        assert_eq!(figures.ratio(), 2.0 / 6.0);
        figures.rsync = Some(Copies::default());
        assert_eq!(figures.ratio(), 2.0 / 6.0);
        figures.rsync = Some(Copies { seconds: vec![1.0], bytes: 0 });
        assert_eq!(figures.ratio(), 2.0);
    }
}
