//! Small steps, every state.
//!
//! Models of three files in which at most four blocks change. For each kind of step: every state that [`states::each`]
//! visits at every position is opened, once if states are the same by their hash. Then for every one of them every state
//! that a crash in its recovery may leave: the double crashes.

use std::collections::BTreeSet;
use std::time::Instant;

use checkpoint::{Checkpoint, Error};

use crate::check::{Outcomes, Scene, each_position, in_parallel, report, without_lock};
use crate::disk::{Fault, Faults, SimulatedDisk};
use crate::image::Image;
use crate::medium::{Medium, Op};
use crate::states::{self, Plan, Tears};
use crate::world::{History, Shape, Step, World, options};

/// With `CRASH_TEARS=every` sectors are torn at every byte and the largest model is tried too, which takes longer than CI has.
fn everything() -> bool {
    std::env::var("CRASH_TEARS").is_ok_and(|tears| tears == "every")
}

/// After the first crash. States that differ from others only in the byte at which a sector is torn are opened, and their
/// recovery does not crash.
fn once() -> Plan {
    Plan { limit: 256, tears: if everything() { Tears::EveryByte } else { Tears::Few } }
}
/// After the second; what is torn already is not torn again here (mending that is a long search), but at random it is.
const TWICE: Plan = Plan { limit: 8, tears: Tears::Few };

/// The models. Between them: tensors of every width, on sectors' boundaries and off them, sharing a sector, crossing a
/// block, as long as a block; one segment and one segment per piece.
pub fn shapes() -> Vec<(&'static str, Shape)> {
    let shape = |tensors: &[_], align, segment| Shape {
        tensors: tensors.to_vec(),
        align,
        state: 700,
        rarity: 1,
        options: options(1, segment),
    };
    vec![
        ("aligned", shape(&[("BF16", 256, 0), ("F32", 128, 1), ("U8", 512, 2)], (512, 0), 1 << 20)),
        ("shared sectors", shape(&[("BF16", 150, 0), ("U8", 333, 0), ("F32", 65, 1), ("F16", 200, 2)], (512, 101), 1)),
        ("across blocks", shape(&[("BF16", 512, 0), ("F32", 60, 1), ("U8", 200, 2)], (4096, 3840), 1100)),
        ("whole blocks", shape(&[("BF16", 2048, 0), ("F32", 1024, 1), ("U8", 3000, 2)], (4096, 0), 5000)),
    ]
}

/// Steps before, and the step whose crashes are visited.
pub const STEPS: [(&str, &[Step], Step); 5] = [
    ("first open", &[], Step::Open),
    ("first sync", &[Step::Open], Step::Sync(1)),
    ("second sync", &[Step::Open, Step::Sync(1)], Step::Sync(2)),
    ("rollback", &[Step::Open, Step::Sync(1), Step::Sync(1)], Step::Rollback(1)),
    ("adopt", &[Step::Open, Step::Sync(1)], Step::Adopt),
];

/// Steps that the same handle does before, whose names no opener has made durable since.
const NONE: &[Step] = &[];
const SYNC: &[Step] = &[Step::Sync(1)];
const REFUSED: &[Step] = &[Step::Sync(1), Step::Adopt];

/// What was visited.
#[derive(Debug, Default)]
pub struct Count {
    pub once: u64,
    pub twice: u64,
}

/// Visits everything that a crash in a step may leave, and in the recovery from that. `keep` says which operations of a
/// log the disk does at all. The steps of `warm` come before it by the same handle, without a crash; where there are none,
/// the step's opening may crash too.
pub fn exhaust(
    scene: &Scene,
    warm: &[Step],
    step: Step,
    plans: (Plan, Plan),
    keep: &dyn Fn(&Op) -> bool,
) -> Result<Count, String> {
    let mut history = scene.history.clone();
    let disk = SimulatedDisk::recording(&scene.image);
    let mut checkpoint = history.world.open(&disk).map_err(|error| error.to_string())?;
    for step in warm {
        match history.run(&mut checkpoint, *step) {
            Ok(()) => history.next(*step).into_iter().for_each(|next| history.advance(next)),
            // Of files that somebody changed.
            Err(Error::Changed { .. }) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    exhaust_from(Handle { history, disk, checkpoint, fresh: warm.is_empty() }, &scene.image, step, plans, keep)
}

/// A handle that may have done something already, on a disk that was recorded meanwhile.
struct Handle {
    history: History,
    disk: SimulatedDisk,
    checkpoint: Checkpoint,
    /// It has only been opened, and that may crash too.
    fresh: bool,
}

/// [`exhaust`] from what a handle has done; `image` is what its disk was before all of it.
fn exhaust_from(
    handle: Handle,
    image: &Image,
    step: Step,
    (once, twice): (Plan, Plan),
    keep: &dyn Fn(&Op) -> bool,
) -> Result<Count, String> {
    let Handle { history, disk, mut checkpoint, fresh } = handle;
    let opened = disk.live();
    let started = disk.log().iter().filter(|op| keep(op)).count();
    let began = if fresh { 0 } else { started };
    history.run(&mut checkpoint, step).map_err(|error| error.to_string())?;
    drop(checkpoint);
    let mut outcomes = Outcomes::new(&history, step, &opened, Some(&disk.live()));
    let (old, new) = (outcomes.old(), outcomes.new_or_old());
    let log: Vec<Op> = disk.log().into_iter().filter(|op| keep(op)).collect();
    if outcomes.open(&disk)? != new {
        return Err("a run without crashes is not the new generation".into());
    }
    let mut expanded = BTreeSet::new();
    let mut count = Count::default();
    each_position(Medium::new(image, true), &log, began, &mut |position, medium| {
        let (may_be_old, may_be_new) = (position < log.len(), position > started);
        let choices = without_lock(medium.choices(), medium);
        let mut failed = None;
        states::each(&choices, once, &mut |pick, worth| {
            if failed.is_some() {
                return;
            }
            let image = medium.image(&choices, pick);
            let hash = image.hash(Some(&crate::check::lock()));
            let mut visit = || -> Result<(), String> {
                if let Some(is) = outcomes.visited.get(&hash).filter(|_| !worth || expanded.contains(&hash)) {
                    return expect(*is, old, new, may_be_old, may_be_new);
                }
                let (is, disk) = outcomes.recover(&image, worth)?;
                count.once += u64::from(outcomes.visited.insert(hash, is).is_none());
                expect(is, old, new, may_be_old, may_be_new)?;
                if !worth || twice.limit == 0 {
                    return Ok(());
                }
                expanded.insert(hash);
                let log: Vec<Op> = disk.log().into_iter().filter(|op| keep(op)).collect();
                let tears = if pick.is_torn() { Tears::None } else { twice.tears };
                let twice = Plan { tears, ..twice };
                let again = again(&mut outcomes, &image, is, &log, twice);
                count.twice += again.map_err(|error| format!("{error}\nand before that, a crash:"))?;
                Ok(())
            };
            failed = visit().err().map(|error| report(&error, medium, &choices, pick, &log, position));
        });
        failed.map_or(Ok(()), Err)
    })?;
    Ok(count)
}

fn expect(is: u64, old: u64, new: u64, may_be_old: bool, may_be_new: bool) -> Result<(), String> {
    match (is == old && (may_be_old || old == new)) || (is == new && may_be_new) {
        true => Ok(()),
        false => Err(format!("the crash left generation {is}")),
    }
}

/// Visits what a crash in the recovery from `image` may leave; `first` is what the recovery made when it came to its end.
fn again(outcomes: &mut Outcomes, image: &Image, first: u64, log: &[Op], plan: Plan) -> Result<u64, String> {
    let (old, new) = (outcomes.old(), outcomes.new_or_old());
    let mut count = 0;
    each_position(Medium::new(image, true), log, 0, &mut |position, medium| {
        let choices = without_lock(medium.choices(), medium);
        let mut failed = None;
        states::each(&choices, plan, &mut |pick, _| {
            if failed.is_some() {
                return;
            }
            let image = medium.image(&choices, pick);
            let hash = image.hash(Some(&crate::check::lock()));
            let mut visit = || -> Result<(), String> {
                let is = match outcomes.visited.get(&hash) {
                    Some(is) => *is,
                    None => {
                        let (is, _) = outcomes.recover(&image, false)?;
                        count += 1;
                        outcomes.visited.insert(hash, is);
                        is
                    }
                };
                match is == first || (position < log.len() && [old, new].contains(&is)) {
                    true => Ok(()),
                    false => Err(format!("recovery had made it generation {first}, and the second open {is}")),
                }
            };
            failed = visit().err().map(|error| report(&error, medium, &choices, pick, log, position));
        });
        failed.map_or(Ok(()), Err)
    })?;
    Ok(count)
}

/// The scene before a step.
pub fn scene(seed: u64, shape: Shape, before: &[Step], step: Step) -> Scene {
    let mut scene = Scene::fresh(History::new(World::new(seed, shape))).after(before);
    if step == Step::Adopt {
        let mut rng = crate::common::Rng(seed);
        scene.history.meddle(&mut scene.image, &mut rng);
    }
    scene
}

/// The scene with a sync on the disk that ended just before its generation got its name.
fn cut_short(scene: Scene) -> Scene {
    let Scene { history, image } = scene;
    let disk = SimulatedDisk::recording(&image);
    let mut checkpoint = history.world.open(&disk).unwrap();
    history.run(&mut checkpoint, Step::Sync(1)).unwrap();
    let mut medium = Medium::new(&image, false);
    disk.log().iter().take_while(|op| !matches!(op, Op::Rename { .. })).for_each(|op| medium.apply(op));
    Scene { image: medium.live(), history }
}

#[test]
fn every_state_of_small_steps_is_one_whole_generation() {
    let mut shapes = shapes();
    if !everything() {
        shapes.retain(|(name, _)| *name != "whole blocks");
    }
    let mut jobs = Vec::new();
    for (name, shape) in &shapes {
        let alone = |(what, before, step)| (*name, what, scene(1, shape.clone(), before, step), NONE, step);
        jobs.extend(STEPS.map(alone));
    }
    visit_all(jobs, (once(), TWICE));
}

/// What a handle has done before stays for the next crash where no barrier made it certain; an opener's barriers come first
/// in every other test.
#[test]
fn a_step_by_a_used_handle_leaves_one_whole_generation() {
    let mut jobs = Vec::new();
    for (name, shape) in shapes().into_iter().take(2) {
        let fresh = || scene(1, shape.clone(), &[Step::Open], Step::Open);
        // Its first sync is refused.
        let meddled = || scene(1, shape.clone(), &[Step::Open], Step::Adopt);
        jobs.extend([
            (name, "adopt after a refused sync", meddled(), REFUSED, Step::Adopt),
            (name, "adopt after a sync", fresh(), SYNC, Step::Adopt),
            (name, "sync after a sync", fresh(), SYNC, Step::Sync(1)),
            (name, "adopt after an undone sync", cut_short(fresh()), NONE, Step::Adopt),
            (name, "sync after an undone sync", cut_short(fresh()), NONE, Step::Sync(1)),
        ]);
    }
    let (once, twice) = (Plan { limit: 64, tears: Tears::None }, Plan { limit: 1, tears: Tears::None });
    visit_all(jobs, (once, twice));
}

/// A process may end where the machine goes on: the next one sees names that no barrier has made certain.
#[test]
fn a_step_after_a_process_that_ended_at_a_barrier_leaves_one_whole_generation() {
    // No second crash.
    let plans = (Plan { limit: 16, tears: Tears::None }, Plan { limit: 0, tears: Tears::None });
    let (_, shape) = shapes().swap_remove(0);
    let [_, sync, .., adopt] = STEPS;
    let jobs = vec![(sync, Step::Sync(1)), (sync, Step::Adopt), (adopt, Step::Adopt)];
    let (began, total) = (Instant::now(), std::sync::Mutex::new(0));
    let run = |((what, before, step), then): ((&str, &[Step], Step), Step)| {
        let scene = scene(1, shape.clone(), before, step);
        for barriers in 0.. {
            let context = |error: String| format!("{then:?} after {what} that ended at barrier {barriers}: {error}");
            let Some(handle) = after_death(&scene, step, barriers).map_err(context)? else { return Ok(()) };
            let count = exhaust_from(handle, &scene.image, then, plans, &|_| true).map_err(context)?;
            *total.lock().unwrap() += count.once;
        }
        Ok(())
    };
    if let Err(error) = in_parallel(jobs, run) {
        panic!("{error}");
    }
    println!("{} states, {:.1?}", total.into_inner().unwrap(), began.elapsed());
}

/// The handle of a process that came after one which ended at this barrier of the step; none if the step has fewer.
fn after_death(scene: &Scene, step: Step, barriers: u64) -> Result<Option<Handle>, String> {
    let Scene { mut history, image } = scene.clone();
    let disk = SimulatedDisk::recording(&image);
    let death = Faults { short: None, fail: Some((Fault::Death, barriers)) };
    disk.set_faults(death);
    let died = history.world.open(&disk).and_then(|mut checkpoint| history.run(&mut checkpoint, step));
    disk.set_faults(Faults::default());
    if died.is_ok() {
        return Ok(None);
    }
    let checkpoint = history.world.open(&disk).map_err(|error| format!("open: {error}"))?;
    let next = history.next(step).filter(|next| next.generation == checkpoint.current().generation);
    next.into_iter().for_each(|next| history.advance(next));
    Ok(Some(Handle { history, disk, checkpoint, fresh: false }))
}

/// Model, step in words, scene, steps by the same handle before it, step.
type Job = (&'static str, &'static str, Scene, &'static [Step], Step);

fn visit_all(jobs: Vec<Job>, plans: (Plan, Plan)) {
    let began = Instant::now();
    let total = std::sync::Mutex::new(0);
    let run = |(name, what, scene, warm, step): Job| {
        let began = Instant::now();
        let count =
            exhaust(&scene, warm, step, plans, &|_| true).map_err(|error| format!("{name}, {what}: {error}"))?;
        *total.lock().unwrap() += count.once + count.twice;
        println!(
            "{name}, {what}: {} states, {} after a second crash, {:.1?}",
            count.once,
            count.twice,
            began.elapsed()
        );
        Ok(())
    };
    if let Err(error) = in_parallel(jobs, run) {
        panic!("{error}");
    }
    println!("{} different states, {:.1?}", total.into_inner().unwrap(), began.elapsed());
}
