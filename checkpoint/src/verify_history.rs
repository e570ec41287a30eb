//! What a rollback will need beside the files: the deltas, optimizer states and documents of earlier generations.

use crate::checkpoint::open_state;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::generation::{Generation, Paths};
use crate::journal::Reader;
use crate::verify::Damage;

/// Checks every byte of the history of `current`; gives what is damaged, and how many earlier generations were found that
/// can be restored.
pub(crate) fn verify_history(disk: &Disk, paths: &Paths, current: &Generation) -> Result<(Vec<Damage>, u64)> {
    let (mut damage, mut restorable) = (Vec::new(), 0);
    let mut documents = Vec::new();
    for number in paths.numbers(disk)?.into_iter().filter(|number| *number < current.generation) {
        note(&mut damage, paths.load(disk, number).map(|document| documents.push(document)));
    }
    for number in disk.numbers(&paths.root.join("history"), ".delta")? {
        note(&mut damage, whole_delta(disk, paths, number));
    }
    for number in disk.numbers(&paths.root.join("state"), "")? {
        let document = documents.iter().find(|document| document.generation == number);
        if let Some(document) = document.filter(|document| document.state.is_some()) {
            note(&mut damage, open_state(disk, paths, document).map(drop));
        }
    }
    // From the current generation back, as a rollback goes: each step needs its delta and ends at a state.
    let mut after = current;
    for document in documents.iter().rev().filter(|document| !document.tensors.is_empty()) {
        if after.previous != Some(document.generation) {
            break;
        }
        let needed =
            [Some(paths.delta(after.generation)), document.state.as_ref().map(|_| paths.state(document.generation))];
        for path in needed.into_iter().flatten() {
            if disk.exists(&path)? {
                continue;
            }
            damage.push(Damage::Other { reason: format!("{} is missing", path.display()) });
        }
        (after, restorable) = (document, restorable + 1);
    }
    Ok((damage, restorable))
}

fn note(damage: &mut Vec<Damage>, checked: Result<()>) {
    damage.extend(checked.err().map(|error| Damage::Other { reason: error.to_string() }));
}

fn whole_delta(disk: &Disk, paths: &Paths, number: u64) -> Result<()> {
    let path = paths.delta(number);
    let delta = Reader::open(disk, &path)?;
    if delta.head.generation != number {
        let reason = format!("it is the delta of generation {}", delta.head.generation);
        return Err(Error::Document { path, reason });
    }
    delta.scan()
}
