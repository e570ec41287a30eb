//! What a rollback will need beside the files: the deltas, optimizer states and documents of earlier generations.

use crate::checkpoint::{of_history, open_state};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths};
use crate::journal::Reader;
use crate::verify::Damage;

/// A generation to which the history leads back.
pub(crate) struct Earlier {
    pub(crate) number: u64,
    /// None if it is damaged or missing: the delta after it leads back to what was before it all the same.
    pub(crate) document: Option<Generation>,
}

/// The generations before `current` that rollback should reach, the last one first.
pub(crate) fn earlier(disk: &Disk, paths: &Paths, current: &Generation) -> Result<Vec<Earlier>> {
    let (mut earlier, mut before) = (Vec::new(), current.previous);
    while let Some(number) = before {
        let document = match paths.load(disk, number) {
            // Thinned: it was let go of.
            Ok(document) if document.tensors.is_empty() => break,
            Ok(document) => Some(document),
            Err(Error::Generation { .. } | Error::Document { .. }) => {
                // Otherwise it was let go of, and its document damaged or removed after that.
                if !disk.exists(&paths.delta(number + 1))? && !disk.exists(&paths.state(number))? {
                    break;
                }
                None
            }
            Err(error) => return Err(error),
        };
        before = document.as_ref().map_or(number.checked_sub(1), |document| document.previous);
        earlier.push(Earlier { number, document });
    }
    Ok(earlier)
}

/// Checks every byte of the history of `current`; gives what is damaged, and how many earlier generations it leads back to.
pub(crate) fn verify_history(disk: &Disk, paths: &Paths, current: &Generation) -> Result<(Vec<Damage>, u64)> {
    let mut damage = Vec::new();
    let earlier = earlier(disk, paths, current)?;
    let mut numbers = paths.numbers(disk)?;
    numbers.extend(earlier.iter().map(|earlier| earlier.number));
    numbers.retain(|number| *number < current.generation);
    numbers.sort_unstable();
    numbers.dedup();
    for number in numbers {
        let document = paths.load(disk, number).map(drop);
        damage.extend(document.err().map(|error| Damage::Other { reason: error.to_string() }));
    }
    let oldest = earlier.last().map_or(current.generation, |earlier| earlier.number);
    for Earlier { number, document } in earlier.iter().rev() {
        let lost = |oldest: u64, checked: Result<()>| {
            let damage = |error: Error| Damage::History { reason: error.to_string(), oldest, newest: *number };
            checked.err().map(damage)
        };
        damage.extend(lost(oldest, whole_delta(disk, paths, number + 1)));
        let state = document.as_ref().map_or(Ok(()), |document| whole_state(disk, paths, document));
        damage.extend(lost(*number, state));
    }
    Ok((damage, earlier.len() as u64))
}

/// Reads the whole delta of a generation and checks it.
pub(crate) fn whole_delta(disk: &Disk, paths: &Paths, number: u64) -> Result<()> {
    let path = paths.delta(number);
    if !disk.exists(&path)? {
        return Err(Error::Document { path, reason: "it is missing".into() });
    }
    let delta = Reader::open(disk, &path)?;
    if delta.head.generation != number {
        let reason = format!("it is the delta of generation {}", delta.head.generation);
        return Err(Error::Document { path, reason });
    }
    delta.scan()
}

/// Reads the optimizer state of an earlier generation, where it has one, and checks it.
fn whole_state(disk: &Disk, paths: &Paths, of: &Generation) -> Result<()> {
    match of.state {
        Some(_) => open_state(disk, paths, of).map(drop).map_err(of_history),
        None => Ok(()),
    }
}
