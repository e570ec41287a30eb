//! Every barrier is needed: a disk that ignores one kind of fsync is convicted.

use std::path::Path;

use crate::check::in_parallel;
use crate::exhaustive::{STEPS, exhaust, scene, shapes};
use crate::medium::Op;
use crate::states::{Plan, Tears};
use crate::world::Step;

/// What a barrier is of.
fn role(op: &Op) -> Option<&'static str> {
    let inside =
        |path: &Path| path.parent().and_then(Path::file_name).and_then(|name| name.to_str()).map(str::to_string);
    let name = op.path().file_name()?.to_str()?;
    match op {
        Op::Sync { path, .. } => Some(match inside(path)?.as_str() {
            _ if name.ends_with(".safetensors") => "shard",
            "state" => "state",
            "sums" => "sums",
            "generations" => "generation",
            _ if name == "journal" => "journal",
            _ => "other file",
        }),
        Op::SyncDir { .. } => Some(match name {
            "model" => "folder of the model",
            ".apollod" => "folder .apollod",
            "state" => "folder state",
            "sums" => "folder sums",
            "generations" => "folder generations",
            "history" => "folder history",
            _ => "other folder",
        }),
        _ => None,
    }
}

#[test]
fn a_disk_that_ignores_one_kind_of_barrier_is_convicted() {
    let roles = [
        "journal",
        "shard",
        "state",
        "sums",
        "generation",
        "folder of the model",
        "folder .apollod",
        "folder state",
        "folder sums",
        "folder generations",
        "folder history",
    ];
    let plan = Plan { limit: 16, tears: Tears::None };
    let again = Plan { limit: 1, tears: Tears::None };
    let run = |ignored: &'static str| {
        let kept = |op: &Op| role(op) != Some(ignored);
        let mut convicted = None;
        // In one step from a disk at rest, and in one after others, whose names may be pending still.
        'found: for (name, shape) in shapes().into_iter().take(2) {
            let warm: &[Step] = &[Step::Sync(1), Step::Sync(1)];
            let alone = STEPS.iter().map(|(what, before, step)| (*what, *before, &[][..], *step));
            let after = ("sync after syncs", &[][..], warm, Step::Sync(1));
            for (what, before, warm, step) in std::iter::once(after).chain(alone) {
                let found = exhaust(&scene(1, shape.clone(), before, step), warm, step, (plan, again), &kept);
                if let Err(error) = found {
                    let first = error.lines().next().unwrap_or_default().to_string();
                    convicted = Some(format!("{name}, {what}: {first}"));
                    break 'found;
                }
            }
        }
        println!("without the fsync of {ignored}: {}", convicted.as_deref().unwrap_or("nothing found"));
        convicted.map(drop).ok_or(format!("nothing is wrong without the fsync of {ignored}"))
    };
    if let Err(error) = in_parallel(roles.to_vec(), run) {
        panic!("{error}");
    }
}
