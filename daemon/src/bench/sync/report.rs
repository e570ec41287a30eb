//! The figures as a table and as JSON.

use super::super::{quartiles, round};
use super::{Figures, Options, Pattern};
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs;
use std::path::Path;

/// What is asked of a sync.
enum Target {
    /// So many times less time than the better peer.
    TimesFaster(f64),
    /// At most so many times its time.
    TimeOver(f64),
}

impl Target {
    /// Of this share of dirty weights, if any.
    fn of(dirty: f64) -> Option<Target> {
        if dirty == 0.1 {
            return Some(Target::TimesFaster(4.0));
        }
        (dirty == 1.0).then_some(Target::TimeOver(1.4))
    }

    fn met(&self, ratio: f64) -> bool {
        match self {
            Target::TimesFaster(times) => 1.0 / ratio >= *times,
            Target::TimeOver(times) => ratio <= *times,
        }
    }
}

fn pattern(pattern: Pattern) -> &'static str {
    match pattern {
        Pattern::Blocks => "blocks",
        Pattern::Tensors => "tensors",
    }
}

/// Median, least and most of seconds, and what was written.
fn contender(seconds: &[f64], written: Value) -> Value {
    let (median, min, max) = quartiles(seconds);
    json!({"seconds": round(median), "spread": [round(min), round(max)], "written_bytes": written})
}

/// One line.
pub fn json(options: &Options, figures: &Figures, machine: &Value) -> Value {
    let (report, ratio) = (&figures.report, figures.ratio());
    let written = json!({
        "in_place": report.bytes_written, "journal": report.bytes_journal, "optimizer_state": report.bytes_state,
        "sums": report.bytes_sums, "total": total(figures),
    });
    let rsync = match &figures.rsync {
        Some(rsync) if !rsync.seconds.is_empty() => contender(&rsync.seconds, json!(rsync.bytes)),
        Some(_) => json!({"absent": "not asked for"}),
        None => json!({"absent": "not installed"}),
    };
    let target = Target::of(options.dirty).map(|target| match target {
        Target::TimesFaster(times) => json!({"times_faster_min": times, "met": target.met(ratio)}),
        Target::TimeOver(times) => json!({"time_over_better_peer_max": times, "met": target.met(ratio)}),
    });
    json!({
        "gib": options.gib, "dirty": options.dirty, "pattern": pattern(options.pattern), "rank": options.rank,
        "moments": options.moments().to_string(),
        "runs": options.runs, "seed": options.seed, "weights_bytes": figures.weights,
        "blocks_total": report.blocks_total, "blocks_changed": report.blocks_changed,
        "sync": contender(&figures.sync, written),
        "safetensors_new": contender(&figures.save_new, json!(figures.weights)),
        "safetensors_over": contender(&figures.save_over, json!(figures.weights)),
        "rsync": rsync,
        "times_faster": round(1.0 / ratio), "time_over_better_peer": round(ratio), "target": target,
        "machine": machine,
    })
}

fn total(figures: &Figures) -> u64 {
    let report = &figures.report;
    report.bytes_written + report.bytes_journal + report.bytes_state + report.bytes_sums
}

/// For people.
pub fn table(options: &Options, figures: &Figures, machine: &Value) -> String {
    let (report, ratio) = (&figures.report, figures.ratio());
    let mut out = String::new();
    let mut line = |text: String| writeln!(out, "{text}").expect("a string takes everything");
    line(format!(
        "{:.2} GB of bf16, {} of {} blocks changed ({}), rank {}, moments in {}, median of {} runs (least - most)",
        figures.weights as f64 / 1e9,
        report.blocks_changed,
        report.blocks_total,
        pattern(options.pattern),
        options.rank,
        options.moments(),
        options.runs
    ));
    let mut row = |name: &str, seconds: &[f64], bytes: u64| {
        let (median, min, max) = quartiles(seconds);
        let mb = bytes as f64 / 1e6;
        line(format!("  {name:<33} {median:>8.2} s  ({min:.2} - {max:.2})  {mb:>9.1} MB written"));
    };
    row("sync", &figures.sync, total(figures));
    row("safetensors, new files", &figures.save_new, figures.weights);
    row("safetensors, over existing files", &figures.save_over, figures.weights);
    match &figures.rsync {
        Some(rsync) if !rsync.seconds.is_empty() => row("rsync, in place", &rsync.seconds, rsync.bytes),
        Some(_) => line("  rsync, in place                   not asked for".into()),
        None => line("  rsync, in place                   not installed; not counted".into()),
    }
    for (name, bytes) in [
        ("in place", report.bytes_written),
        ("journal, then delta history", report.bytes_journal),
        ("optimizer state", report.bytes_state),
        ("sums", report.bytes_sums),
    ] {
        line(format!("    the sync: {name:<28} {:>9.1} MB", bytes as f64 / 1e6));
    }
    line(format!("  sync: {:.2} times as fast as the better peer, {ratio:.2} of its time", 1.0 / ratio));
    if let Some(target) = Target::of(options.dirty) {
        let met = if target.met(ratio) { "met" } else { "not met" };
        line(match target {
            Target::TimesFaster(times) => format!("  target: {times} times as fast or more: {met}"),
            Target::TimeOver(times) => format!("  target: {times} of its time or less: {met}"),
        });
    }
    line(format!("  machine: {machine}"));
    out
}

/// Processor, memory, file system, and how busy it was before.
pub fn machine(dir: &Path) -> Value {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Option<f64> = load.split(' ').next().and_then(|load| load.parse().ok());
    json!({
        "cpu": model.map(|(_, name)| name), "threads": std::thread::available_parallelism().map_or(1, |n| n.get()),
        "memory_bytes": meminfo("MemTotal"), "file_system": file_system(dir), "load_average": load,
    })
}

/// A line of /proc/meminfo, in bytes.
pub fn meminfo(key: &str) -> Option<u64> {
    let all = fs::read_to_string("/proc/meminfo").ok()?;
    let line = all.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The type of the file system that a folder is on: that of the longest mount point above it.
fn file_system(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mount = |line: &str| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    };
    let above = mounts.lines().filter_map(mount).filter(|(point, _)| dir.starts_with(point));
    above.max_by_key(|(point, _)| point.len()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_of_a_tenth_and_of_all() {
        let met = |dirty: f64, ratio: f64| Target::of(dirty).map(|target| target.met(ratio));
        assert_eq!(met(0.1, 0.25), Some(true));
        assert_eq!(met(0.1, 0.26), Some(false));
        assert_eq!(met(1.0, 1.4), Some(true));
        assert_eq!(met(1.0, 1.41), Some(false));
        assert_eq!(met(0.5, 0.1), None);
    }
}
