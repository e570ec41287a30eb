//! What is kept of older generations, and what goes.
//!
//! A generation can be restored while the deltas of all after it are there, so history is a run of generations that ends
//! at the current one, and only its oldest can go. It goes when one of three bounds ([`Keep`]) says so: their number,
//! their bytes, their age. The last one before the current always stays if any is to be kept, whatever its size and age:
//! the last sync can be taken back.
//!
//! # Age and clocks
//!
//! Clocks jump, and a wrong one must not cost a history. So:
//! - Age is counted between two stamps: how much earlier than the current generation another was made. The clock itself
//!   is not asked: a machine that was off for a year, or whose clock is wrong while nothing is synced, loses nothing.
//! - What lies after the current generation, because the clock went back, is of age 0. What was made while it was back
//!   is as old as its stamp says, and goes when everything before it has gone.
//! - Only a sync removes by age, not an open, and never more than two at once, the oldest: the history then gets shorter
//!   by one. A clock that jumps ahead and is set right again has cost as many generations as there were syncs meanwhile.
//!
//! Number and bytes hold at once: they are what bounds the disk.

use std::path::PathBuf;
use std::time::Duration;

use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::generation::Paths;
use crate::journal::Reader;

/// Generations that one sync removes for their age, at most.
const AGED_MAX: u64 = 2;

/// Bounds of the history beside the current generation. By default everything is kept: only who knows what the operator
/// wants may remove. See the crate's `retain.rs` for what happens when clocks jump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// Generations before the current one that can be restored; each costs a delta (10 to 35% of the
    /// trained weights' bytes) and a copy of the optimizer state on disk. 0 keeps none. Default any number.
    pub generations: u64,
    /// Bytes that their deltas and optimizer states may have together. Default any number.
    pub bytes: u64,
    /// How much earlier than the current generation they may have been made. Default any time.
    pub age: Duration,
}

impl Default for Keep {
    fn default() -> Keep {
        Keep { generations: u64::MAX, bytes: u64::MAX, age: Duration::MAX }
    }
}

impl Keep {
    /// The same without the bound of age.
    pub(crate) fn at_any_age(self) -> Keep {
        Keep { age: Duration::MAX, ..self }
    }
}

/// Removes deltas and states that lie further back than `keep` says, and sums of other generations; documents
/// further back lose their tensors. Gives the generations to which nothing leads back any more, and the first error, after
/// which the rest is done all the same.
pub(crate) fn prune(disk: &Disk, paths: &Paths, current: u64, keep: Keep) -> (Vec<u64>, Option<Error>) {
    let (mut lost, mut failed) = (Vec::new(), None);
    let found =
        oldest(disk, paths, current, keep).and_then(|oldest| Ok((oldest, too_old(disk, paths, current, oldest)?)));
    let (oldest, old) = match found {
        Ok(found) => found,
        Err(error) => return (lost, Some(error)),
    };
    let mut tried = |done: Result<()>| {
        let ok = done.is_ok();
        failed = failed.take().or(done.err());
        ok
    };
    // First, so that no document says that what is removed can be restored; where there is no room for thinner ones, what
    // is removed makes it.
    let thinned = tried(thin(disk, paths, oldest));
    for (path, leads_to) in old {
        // A delta ends with the document of its generation, and may be the last to have it.
        let kept = leads_to.map_or(Ok(()), |before| keep_document(disk, paths, before + 1, oldest));
        if tried(kept) && tried(disk.remove(&path).map(drop)) {
            lost.extend(leads_to);
        }
    }
    if !thinned {
        tried(thin(disk, paths, oldest));
    }
    (lost, failed)
}

/// Writes the document of a generation from its delta, where it is missing or damaged and the delta is whole; without its
/// tensors if it is let go of.
fn keep_document(disk: &Disk, paths: &Paths, number: u64, oldest: u64) -> Result<()> {
    let Err(Error::Generation { .. }) = paths.load(disk, number) else { return Ok(()) };
    let mut document = match Reader::open(disk, &paths.delta(number)).and_then(Reader::last) {
        Ok(document) if document.generation == number => document,
        Ok(_) | Err(Error::Torn { .. }) => return Ok(()),
        // It may well be whole.
        Err(error) => return Err(error),
    };
    if number < oldest {
        document.tensors.clear();
    }
    disk.replace(&paths.generation(number), &document.to_json())
}

/// The files of what is older than `oldest`, each delta with the generation that it leads back to.
fn too_old(disk: &Disk, paths: &Paths, current: u64, oldest: u64) -> Result<Vec<(PathBuf, Option<u64>)>> {
    let mut old = Vec::new();
    for number in disk.numbers(&paths.root.join("history"), ".delta")? {
        if number <= oldest || number > current {
            let before = number.checked_sub(1).filter(|before| *before < current);
            old.push((paths.delta(number), before));
        }
    }
    for number in disk.numbers(&paths.root.join("state"), "")? {
        if number < oldest || number > current {
            old.push((paths.state(number), None));
        }
    }
    for number in disk.numbers(&paths.root.join("sums"), "")? {
        if number != current {
            old.push((paths.sums(number), None));
        }
    }
    Ok(old)
}

/// The oldest generation that stays restorable.
fn oldest(disk: &Disk, paths: &Paths, current: u64, keep: Keep) -> Result<u64> {
    let history = disk.numbers(&paths.root.join("history"), ".delta")?;
    let states = disk.numbers(&paths.root.join("state"), "")?;
    let bytes = |path: PathBuf| disk.stat(&path).ok().flatten().map_or(0, |stat| stat.bytes);
    let cost = |number: u64| {
        // Where the delta alone is missing, it may come back (see `repair.rs`), and what lies before it is kept for that.
        let lacks = || {
            let before = history.first().is_some_and(|oldest| *oldest <= number);
            let kept = match paths.load(disk, number) {
                Ok(of) => !of.tensors.is_empty(),
                Err(_) => before || states.binary_search(&number).is_ok(),
            };
            // A document after it that is damaged or missing too says nothing against it.
            kept && paths.load(disk, number + 1).map_or(true, |after| after.previous == Some(number))
        };
        let there = history.binary_search(&(number + 1)).is_ok() || lacks();
        there.then(|| bytes(paths.delta(number + 1)) + bytes(paths.state(number)))
    };
    let age = |number: u64| {
        let created = |number| paths.load(disk, number).map(|generation| generation.created_unix);
        // A document that cannot be read says nothing of its age.
        let seconds = created(current).and_then(|now| Ok(now.saturating_sub(created(number)?)));
        seconds.map_or(Duration::ZERO, Duration::from_secs)
    };
    Ok(bounded(current, keep, cost, age))
}

/// [`oldest`] of what each generation costs, none where it cannot be restored, and of its age.
fn bounded(current: u64, keep: Keep, cost: impl Fn(u64) -> Option<u64>, age: impl Fn(u64) -> Duration) -> u64 {
    let mut oldest = current;
    let mut bytes = 0_u64;
    while current - oldest < keep.generations && oldest > 0 {
        let Some(cost) = cost(oldest - 1) else { break };
        bytes = bytes.saturating_add(cost);
        if bytes > keep.bytes && oldest < current {
            break;
        }
        oldest -= 1;
    }
    for _ in 0..AGED_MAX {
        if current - oldest > 1 && age(oldest) > keep.age {
            oldest += 1;
        }
    }
    oldest
}

/// Takes the tensors out of the documents before `oldest`: from the oldest on, so that a crash leaves
/// thin ones before thick ones and the walk from the newest can stop at the first thin one.
fn thin(disk: &Disk, paths: &Paths, oldest: u64) -> Result<()> {
    let mut thick = Vec::new();
    for number in disk.numbers(&paths.root.join("generations"), ".json")?.into_iter().rev() {
        if number >= oldest {
            continue;
        }
        let generation = match paths.load(disk, number) {
            // Damaged, and of no use any more: no reason to keep anybody from working.
            Err(Error::Generation { .. } | Error::Document { .. }) => continue,
            read => read?,
        };
        if generation.tensors.is_empty() {
            break;
        }
        thick.push(generation);
    }
    for mut generation in thick.into_iter().rev() {
        generation.tensors.clear();
        let path = paths.generation(generation.generation);
        disk.replace(&path, &generation.to_json())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Keep = Keep { generations: u64::MAX, bytes: u64::MAX, age: Duration::MAX };

    fn by_age(stamps: &[u64], days: u64) -> u64 {
        let current = stamps.len() as u64 - 1;
        let age = |number: u64| Duration::from_secs(stamps[current as usize].saturating_sub(stamps[number as usize]));
        bounded(current, Keep { age: Duration::from_secs(days), ..ANY }, |_| Some(1), age)
    }

    #[test]
    fn number_and_bytes_hold_at_once_and_the_last_one_before_stays() {
        let oldest = |keep: Keep| bounded(9, keep, |number| Some(10 + number), |_| Duration::ZERO);
        assert_eq!(oldest(ANY), 0);
        assert_eq!(oldest(Keep { generations: 3, ..ANY }), 6);
        assert_eq!(oldest(Keep { generations: 0, ..ANY }), 9);
        assert_eq!(oldest(Keep { bytes: 18 + 17 + 16, ..ANY }), 6);
        assert_eq!(oldest(Keep { bytes: 18 + 17 + 15, ..ANY }), 7);
        assert_eq!(oldest(Keep { bytes: 0, ..ANY }), 8);
        assert_eq!(oldest(Keep { bytes: 0, generations: 0, ..ANY }), 9);
    }

    #[test]
    fn history_ends_where_a_delta_is_missing() {
        let cost = |number: u64| (number != 4).then_some(1);
        assert_eq!(bounded(9, ANY, cost, |_| Duration::ZERO), 5);
        // The age of what cannot be restored any more is not looked at: the two that go are of those that can be.
        assert_eq!(bounded(9, Keep { age: Duration::ZERO, ..ANY }, cost, |_| Duration::from_secs(1)), 7);
    }

    #[test]
    fn the_oldest_go_by_age_two_with_a_sync_and_never_the_last_one_before() {
        assert_eq!(by_age(&[1, 2, 3, 14], 10), 2);
        assert_eq!(by_age(&[1, 2, 3, 14], 12), 1);
        assert_eq!(by_age(&[1, 2, 3, 14], 13), 0);
        assert_eq!(by_age(&[1, 14], 1), 0);
        assert_eq!(by_age(&[1, 2, 14], 1), 1);
    }

    #[test]
    fn a_clock_that_jumps_does_not_cost_the_history() {
        let regular: Vec<u64> = (100..200).collect();
        let with = |stamp: u64| by_age(&[&regular[..], &[stamp]].concat(), 1000);
        assert_eq!(with(200), 0);
        assert_eq!(with(0), 0, "back");
        assert_eq!(with(u64::MAX), 2, "ahead");
        // Set right again: what was stamped ahead counts as new.
        assert_eq!(by_age(&[&regular[..], &[u64::MAX, 201]].concat(), 1000), 0);
    }
}
