//! What is kept of older generations, and what goes.

use crate::disk::Disk;
use crate::error::Result;
use crate::generation::Paths;

/// Removes deltas and states that lie further back than `keep`, and sums of other generations; documents
/// further back lose their tensors.
pub(crate) fn prune(disk: &Disk, paths: &Paths, current: u64, keep: u64) -> Result<()> {
    let oldest = current.saturating_sub(keep);
    let mut old = Vec::new();
    for number in disk.numbers(&paths.root.join("history"), ".delta")? {
        if number <= oldest || number > current {
            old.push(paths.delta(number));
        }
    }
    for number in disk.numbers(&paths.root.join("state"), "")? {
        if number < oldest || number > current {
            old.push(paths.state(number));
        }
    }
    for number in disk.numbers(&paths.root.join("sums"), "")? {
        if number != current {
            old.push(paths.sums(number));
        }
    }
    for path in old {
        disk.remove(&path)?;
    }
    thin(disk, paths, oldest)
}

/// Takes the tensors out of the documents before `oldest`: from the oldest on, so that a crash leaves
/// thin ones before thick ones and the walk from the newest can stop at the first thin one.
fn thin(disk: &Disk, paths: &Paths, oldest: u64) -> Result<()> {
    let mut thick = Vec::new();
    for number in disk.numbers(&paths.root.join("generations"), ".json")?.into_iter().rev() {
        if number >= oldest {
            continue;
        }
        let generation = paths.load(disk, number)?;
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
