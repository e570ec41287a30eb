//! Each fault at each operation of each kind of step: what the error leaves, for the handle and for the next open.

use checkpoint::Error;

use crate::check::Outcomes;
use crate::disk::{Fault, Faults, SimulatedDisk};
use crate::exhaustive::{STEPS, scene};
use crate::world::{Shape, expect_known, is_uncertain, options};

fn shape() -> Shape {
    Shape {
        tensors: vec![("BF16", 150, 0), ("U8", 333, 0), ("F32", 65, 1)],
        align: (512, 101),
        state: 700,
        rarity: 1,
        options: options(1, 1),
    }
}

/// What came of a handle that met an error.
#[derive(Default)]
struct Seen {
    went_on: u32,
    refused: u32,
}

#[test]
fn a_fault_at_any_operation_leaves_one_generation_and_a_handle_that_works_or_refuses() {
    for (what, before, step) in STEPS {
        for fault in Fault::ALL {
            let mut seen = Seen::default();
            for after in 0.. {
                let context = format!("{what}, {fault:?} after {after}");
                let scene = scene(3, shape(), before, step);
                let (history, world) = (&scene.history, &scene.history.world);
                let disk = SimulatedDisk::with(&scene.image, true, Faults::default());
                let opened = match before {
                    [] => None,
                    _ => Some(world.open(&disk).unwrap()),
                };
                let old = disk.live();
                disk.set_faults(Faults { short: Some(after), fail: Some((fault, after)) });
                let result = match opened {
                    Some(mut checkpoint) => {
                        history.run(&mut checkpoint, step).map_err(|error| (error, Some(checkpoint)))
                    }
                    None => world.open(&disk).map(drop).map_err(|error| (error, None)),
                };
                let hit = disk.hit();
                disk.set_faults(Faults::default());
                let done = disk.live();
                let mut outcomes = Outcomes::new(history, step, if before.is_empty() { &done } else { &old }, None);
                let (old, new) = (outcomes.old(), outcomes.new_or_old());
                match result {
                    Ok(()) => {
                        assert_eq!(outcomes.open(&disk).unwrap(), new, "{context}");
                        if !hit {
                            break;
                        }
                    }
                    Err((error, checkpoint)) => {
                        assert!(hit, "{context}: {error}");
                        if let Some(mut checkpoint) = checkpoint {
                            match history.run(&mut checkpoint, step) {
                                Ok(()) => {
                                    seen.went_on += 1;
                                    assert!(!is_uncertain(&error), "{context}: {error}");
                                    expect_known(world, &checkpoint, &disk, outcomes.known(new)).unwrap();
                                }
                                Err(Error::Unusable { .. }) => seen.refused += 1,
                                Err(again) => panic!("{context}: {error}, and then {again}"),
                            }
                        } else {
                            outcomes = Outcomes::new(history, step, &world_after_open(&scene), None);
                        }
                        let is =
                            outcomes.open(&disk).unwrap_or_else(|wrong| panic!("{context}: {error}, and then {wrong}"));
                        assert!([old, new].contains(&is), "{context}: {is}");
                    }
                }
            }
            println!("{what}, {fault:?}: {} went on, {} refused", seen.went_on, seen.refused);
            let syncs = !before.is_empty() && fault == Fault::Sync;
            assert!(!syncs || (seen.refused > 0 && seen.went_on == 0), "{what}: a failed fsync was tried again");
        }
    }
}

/// The directory after a first open without faults.
fn world_after_open(scene: &crate::check::Scene) -> crate::image::Image {
    let disk = SimulatedDisk::new(&scene.image);
    drop(scene.history.world.open(&disk).unwrap());
    disk.live()
}
