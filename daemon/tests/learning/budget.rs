//! What the trainer takes of the machine: niceness, and a share of the time.

use super::harness::{Place, Process, post, until, wait_trained};
use super::taught;
use serde_json::json;
use std::time::{Duration, Instant};

/// Fields of proc(5)'s stat after the name of the program: state is the first.
fn stat(pid: u64) -> Vec<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    text.rsplit(')').next().unwrap().split_whitespace().map(String::from).collect()
}

/// Time on a processor, in ticks of 10 ms.
fn ticks(pid: u64) -> u64 {
    let stat = stat(pid);
    stat[11].parse::<u64>().unwrap() + stat[12].parse::<u64>().unwrap()
}

fn trainer(daemon: &Process) -> u64 {
    daemon.get("/v1/status")["trainer_pid"].as_u64().unwrap()
}

/// Share of the time in which a trainer with one thread computes, while there is always an example that waits.
fn busy_share(place: &Place, duty_cycle: &str) -> f64 {
    let daemon = place.daemon(&["train.threads=1", duty_cycle]);
    post(&daemon, taught(3000));
    until("it trains", || daemon.get("/v1/status")["step"].as_u64() > Some(2));
    let (pid, clock) = (trainer(&daemon), Instant::now());
    let before = ticks(pid);
    std::thread::sleep(Duration::from_secs(3));
    let share = (ticks(pid) - before) as f64 / 100.0 / clock.elapsed().as_secs_f64();
    assert!(daemon.get("/v1/status")["queue"]["queued"].as_u64() > Some(0), "the trainer ran out of work");
    share
}

#[test]
fn a_duty_cycle_of_a_quarter_is_a_quarter_of_the_time() {
    let (quarter, all) = (Place::new(), Place::new());
    let (engine, other) = (quarter.engine(), all.engine());
    let (rested, busy) = (busy_share(&quarter, "train.duty_cycle=0.25"), busy_share(&all, "train.duty_cycle=1.0"));
    println!("busy {rested:.2} and {busy:.2} of the time");
    // A step that waits for a processor counts as a step, so that on a machine with other work both are lower.
    assert!(rested > 0.02 && rested < 0.4, "{rested}");
    assert!(busy > 1.5 * rested, "{busy} and {rested}");
    drop((engine, other));
}

#[test]
fn a_rest_keeps_nobody_waiting() {
    let place = Place::new();
    let engine = place.engine();
    // The least there is: after a step of 32 examples, 10 ms each, half a minute of rest, beside which a sync is short on
    // any disk.
    let daemon = place.daemon(&["train.duty_cycle=0.01", "train.batch_examples=32"]);
    post(&daemon, taught(64));
    until("the first step is done", || daemon.get("/v1/status")["step"] == 1);
    let status = daemon.get("/v1/status");
    assert_eq!(
        (&status["state"], &status["detail"]),
        (&json!("idle"), &json!("rests after a step (train.duty_cycle)"))
    );
    let clock = Instant::now();
    let rest = Duration::from_secs_f64(99.0 * status["timings"]["total_ms"].as_f64().unwrap() / 1e3);
    assert_eq!(daemon.post("/v1/checkpoint", json!({}))["generation"], 1);
    daemon.stop();
    assert!(clock.elapsed() < rest / 2, "a sync and the end took {:?} in a rest of {rest:?}", clock.elapsed());
    engine.stop();
}

#[test]
fn a_nice_trainer_is_nice_in_all_its_threads_and_says_so() {
    let place = Place::new();
    let engine = place.engine();
    let daemon = place.daemon(&["train.nice=7", "train.threads=2", "train.duty_cycle=0.5"]);
    wait_trained(&daemon, &post(&daemon, taught(2)));
    let own = |pid: u64| stat(pid)[16].parse::<i64>().unwrap();
    let (ours, pid) = (own(daemon.child.id().into()), trainer(&daemon));
    assert_eq!(own(pid), (ours + 7).min(19));
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        // One that has ended meanwhile says nothing.
        let Ok(stat) = std::fs::read_to_string(thread.unwrap().path().join("stat")) else { continue };
        let nice = stat.rsplit(')').next().unwrap().split_whitespace().nth(16).unwrap().parse::<i64>().unwrap();
        assert_eq!(nice, (ours + 7).min(19), "{stat}");
    }
    let budget = &daemon.get("/v1/status")["budget"];
    assert_eq!(budget, &json!({"workers": 1, "threads": 2, "nice": (ours + 7).min(19), "duty_cycle": 0.5}));
    daemon.stop();
    engine.stop();
}
