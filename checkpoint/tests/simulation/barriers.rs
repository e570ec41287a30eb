//! Every barrier is needed: a disk that ignores one kind of fsync is convicted, or the reason why not stands here.

use std::path::Path;

use crate::check::in_parallel;
use crate::exhaustive::{STEPS, exhaust, scene, shapes};
use crate::medium::Op;
use crate::states::{Plan, Tears};

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

/// Barriers without which the simulation finds nothing wrong, and why they are there.
const EXPLAINED: [(&str, &str); 1] = [(
    "folder of the model",
    "names .apollod, of which nothing is promised before it has a generation: without it a first use is done again; \
     later ones keep it, since the next fsync in it would be of a folder that is not there",
)];

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
        'found: for (name, shape) in shapes().into_iter().take(2) {
            for (what, before, step) in STEPS {
                let found = exhaust(&scene(1, shape.clone(), before, step), step, (plan, again), &kept);
                if let Err(error) = found {
                    let first = error.lines().next().unwrap_or_default().to_string();
                    convicted = Some(format!("{name}, {what}: {first}"));
                    break 'found;
                }
            }
        }
        let explained = EXPLAINED.iter().find(|(role, _)| *role == ignored);
        println!("without the fsync of {ignored}: {}", convicted.as_deref().unwrap_or("nothing found"));
        match (&convicted, explained) {
            (Some(_), None) | (None, Some(_)) => Ok(()),
            (None, None) => Err(format!("nothing is wrong without the fsync of {ignored}")),
            (Some(_), Some((_, why))) => Err(format!("{ignored} is needed, and yet it is said that it {why}")),
        }
    };
    if let Err(error) = in_parallel(roles.to_vec(), run) {
        panic!("{error}");
    }
}
