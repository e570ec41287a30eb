//! The supervisor against tests/support/fake_trainer.sh: a real child process that speaks the protocol and trains
//! nothing.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::*;
use crate::queue::{Added, NewExample, Record, State as ExampleState};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake_trainer.sh");

/// A supervisor on a fake trainer, ended when dropped.
struct Stand {
    dir: tempfile::TempDir,
    queue: Arc<Queue>,
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl Stand {
    fn start(orders: &[(&str, &str)]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), orders)
    }

    fn start_in(dir: tempfile::TempDir, orders: &[(&str, &str)]) -> Self {
        Self::start_on(dir, orders, None, 1, 1.0)
    }

    /// On files that are known before a trainer speaks of them.
    fn start_on(
        dir: tempfile::TempDir,
        orders: &[(&str, &str)],
        files: Option<Files>,
        workers: usize,
        duty_cycle: f64,
    ) -> Self {
        for (name, text) in orders {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let queue = Arc::new(Queue::open(&queue_path(dir.path()), 1000).unwrap());
        let command = format!("FAKE_TRAINER='{}' exec '{SCRIPT}'", dir.path().display());
        let options = Options {
            command: ChildCommand { program: "/bin/sh".into(), arguments: vec!["-c".into(), command.into()] },
            model: "fake".into(),
            batch_examples: 2,
            workers,
            duty_cycle,
            schedule: Schedule::parse("0 0 1 1 *", "UTC").unwrap(),
            sync_on_shutdown: true,
            restart_delay: Duration::from_millis(10),
            server_delay: Duration::from_millis(50),
            queue_delay: Duration::from_millis(20),
            files,
            silence_max: Duration::from_millis(300),
        };
        let (handle, thread) = start(options, Arc::clone(&queue)).unwrap();
        Self { dir, queue, handle, thread: Some(thread) }
    }

    fn order(&self, name: &str, text: &str) {
        std::fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn add(&self, count: u32) -> Vec<String> {
        let example = |first| NewExample {
            ids: vec![first, 2, 3],
            spans: std::iter::once(1..3).collect(),
            weight: 1.0,
            priority: 0,
            tags: Vec::new(),
            source: None,
            lr: None,
            job: None,
        };
        let examples: Vec<NewExample> = (0..count).map(example).collect();
        let Added::New(ids) = self.queue.add(&examples, None, |_| unreachable!()).unwrap() else { panic!() };
        self.handle.wake();
        ids
    }

    fn get(&self, id: &str) -> Record {
        self.queue.get(id).unwrap().unwrap()
    }

    fn wait_for(&self, ids: &[String], state: ExampleState) {
        let what = format!("examples to be {state}");
        self.until(&what, || ids.iter().all(|id| self.get(id).state == state));
    }

    fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !holds() {
            assert!(
                Instant::now() < deadline,
                "waited 120 s for {what}; log:\n{}\n{}",
                self.log(),
                self.handle.status()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn until_state(&self, state: State) {
        self.until(&state.to_string(), || self.handle.status().state == state);
    }

    /// What the trainers were asked, one line each; `start` for each trainer.
    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    fn requests(&self, of: &str) -> Vec<String> {
        self.log().lines().filter(|line| line.contains(of)).map(str::to_owned).collect()
    }

    fn stop(&mut self) {
        self.handle.shutdown();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.stop();
    }
}

fn queue_path(dir: &Path) -> PathBuf {
    dir.join("queue.sqlite")
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn examples_are_trained_in_order_and_in_batches() {
    let stand = Stand::start(&[]);
    let ids = stand.add(5);
    stand.wait_for(&ids, ExampleState::Trained);
    let records: Vec<Record> = ids.iter().map(|id| stand.get(id)).collect();
    assert_eq!(records.iter().map(|r| r.seq.unwrap()).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert_eq!(records.iter().map(|r| r.step.unwrap()).collect::<Vec<_>>(), [1, 1, 2, 2, 3]);
    assert_eq!(records[0].loss, Some(0.5));
    stand.until_state(State::Idle);
    let status = stand.handle.status();
    assert_eq!((status.step, status.weight_version, status.queue["trained"]), (3, 3, 5));
    assert_eq!(status.last_losses.len(), 3);
}

#[test]
fn a_trainer_killed_in_a_step_is_replaced_and_gets_the_same_batch_again() {
    let stand = Stand::start(&[("die_at_step", "2")]);
    let ids = stand.add(4);
    stand.wait_for(&ids, ExampleState::Trained);
    let trains = stand.requests("train");
    // Steps 1 and 2, then, from cursor 0, both again.
    assert_eq!(trains.len(), 4, "{trains:#?}");
    assert_eq!(trains[2..], trains[..2]);
    let status = stand.handle.status();
    assert_eq!(status.restarts, 1);
    assert!(status.last_restart.as_ref().unwrap().contains("signal 9"), "{status}");
    assert_eq!(stand.get(&ids[2]).seq, Some(3));
}

#[test]
fn the_last_word_of_a_trainer_is_why_it_was_replaced() {
    let stand = Stand::start(&[("say_at_step", "1")]);
    let ids = stand.add(2);
    stand.wait_for(&ids, ExampleState::Trained);
    let why = stand.handle.status().last_restart.unwrap();
    assert!(why.ends_with("ended: exit status 101: CUDA error X (7) in y"), "{why}");
}

#[test]
fn a_trainer_that_hangs_is_killed_and_gets_a_successor() {
    let stand = Stand::start(&[("hang_at_step", "2")]);
    let ids = stand.add(6);
    stand.wait_for(&ids, ExampleState::Trained);
    let status = stand.handle.status();
    assert_eq!(status.restarts, 1, "{status}");
    assert!(status.last_restart.is_some_and(|why| why.contains("no sign of life")));
}

#[test]
fn what_a_generation_holds_is_not_trained_again() {
    let stand = Stand::start(&[("die_at_step", "3")]);
    let first = stand.add(2);
    stand.wait_for(&first, ExampleState::Trained);
    block_on(stand.handle.sync("test")).unwrap();
    let second = stand.add(4);
    stand.wait_for(&second, ExampleState::Trained);
    let steps: Vec<bool> = stand.requests("train").iter().map(|line| line.contains("\"step\":1,")).collect();
    assert_eq!(steps, [true, false, false, false, false], "step 1 once; steps 2 and 3 twice");
    assert!(stand.get(&first[0]).in_files);
    assert!(!stand.get(&second[0]).in_files);
}

#[test]
fn an_undisturbed_and_a_restarted_daemon_train_the_same_steps() {
    let mut stand = Stand::start(&[("step_seconds", "0.2")]);
    let ids = stand.add(6);
    stand.until("the second step", || stand.requests("train").len() == 2);
    stand.stop();
    let trained = ids.iter().filter(|id| stand.get(id).state == ExampleState::Trained).count();
    assert_eq!(trained, 4, "the step in flight was finished");
    assert!(stand.requests("shutdown")[0].contains("\"sync\":true"));
    let dir = std::mem::replace(&mut stand.dir, tempfile::tempdir().unwrap());
    let stand = Stand::start_in(dir, &[("step_seconds", "0")]);
    stand.wait_for(&ids, ExampleState::Trained);
    let trains = stand.requests("train");
    assert_eq!(trains.len(), 3, "each step once: {trains:#?}");
    assert!(trains[2].contains("\"step\":3,"));
}

#[test]
fn a_step_that_kills_every_trainer_is_given_up_and_the_rest_goes_on() {
    let stand = Stand::start(&[("die_always", "1")]);
    let ids = stand.add(4);
    stand.wait_for(&ids[2..], ExampleState::Trained);
    let record = stand.get(&ids[0]);
    assert_eq!(record.state, ExampleState::Failed);
    assert!(record.reason.as_ref().unwrap().contains("5 trainers in a row died"), "{record:?}");
    assert_eq!(stand.handle.status().restarts, u64::from(DEATHS_MAX));
}

#[test]
fn a_step_that_kills_every_trainer_is_given_up_after_earlier_ones_are_replayed_too() {
    let stand = Stand::start(&[("die_always", "2")]);
    let ids = stand.add(6);
    stand.wait_for(&ids[4..], ExampleState::Trained);
    assert_eq!(stand.get(&ids[2]).state, ExampleState::Failed);
    assert_eq!(stand.handle.status().restarts, u64::from(DEATHS_MAX));
}

/// A supervisor of a trainer with two workers.
fn two_workers(orders: &[(&str, &str)], duty_cycle: f64) -> Stand {
    Stand::start_on(tempfile::tempdir().unwrap(), orders, None, 2, duty_cycle)
}

#[test]
fn steps_are_sent_ahead_of_two_workers_and_whatever_else_is_asked_waits_for_all() {
    let stand = two_workers(&[("step_seconds", "0.1")], 1.0);
    stand.until_state(State::Idle);
    let ids = stand.add(20);
    stand.until("a step", || stand.handle.status().step == 1);
    // The trainer logs what it reads, one request at a time; what is sent shows in the queue.
    stand.until("steps ahead", || stand.handle.status().queue.get("training") == Some(&8));
    block_on(stand.handle.sync("test")).unwrap();
    stand.wait_for(&ids, ExampleState::Trained);
    let log = stand.log();
    let steps: Vec<&str> = log.lines().filter(|line| line.contains("train")).collect();
    assert_eq!(steps.len(), 10, "{log}");
    let in_order = |(i, line): (usize, &&str)| line.contains(&format!("\"step\":{},", i + 1));
    assert!(steps.iter().enumerate().all(in_order), "{log}");
    assert_eq!(stand.requests("sync").len(), 1, "{log}");
}

#[test]
fn of_several_steps_in_flight_the_one_that_kills_trainers_is_found() {
    let stand = two_workers(&[("die_always", "3")], 1.0);
    let ids = stand.add(12);
    stand.wait_for(&ids[6..], ExampleState::Trained);
    for (i, id) in ids.iter().enumerate() {
        let want = if [4, 5].contains(&i) { ExampleState::Failed } else { ExampleState::Trained };
        assert_eq!(stand.get(id).state, want, "example {i}");
    }
    // Once beside others, unless they were answered by then, and as often as it takes alone.
    let restarts = stand.handle.status().restarts;
    assert!((u64::from(DEATHS_MAX)..=u64::from(DEATHS_MAX) + 1).contains(&restarts), "{restarts}");
}

#[test]
fn a_step_that_fails_or_is_skipped_leaves_the_others_in_flight_alone() {
    let stand = two_workers(&[("fail_step", "2"), ("skip_step", "3"), ("step_seconds", "0.05")], 1.0);
    let ids = stand.add(10);
    stand.wait_for(&ids[8..], ExampleState::Trained);
    let states: Vec<ExampleState> = ids.iter().step_by(2).map(|id| stand.get(id).state).collect();
    use ExampleState::{Failed, Skipped, Trained};
    assert_eq!(states, [Trained, Failed, Skipped, Trained, Trained]);
    assert_eq!(stand.handle.status().restarts, 0);
}

#[test]
fn workers_rest_together() {
    let stand = two_workers(&[("step_seconds", "0.05")], 0.25);
    stand.until_state(State::Idle);
    let (ids, clock) = (stand.add(8), Instant::now());
    stand.wait_for(&ids, ExampleState::Trained);
    // This trainer has one step after the other: two of 0.1 s, a rest of three times that, and two again.
    assert!(clock.elapsed() >= Duration::from_millis(100 + 300 + 100), "{:?}", clock.elapsed());
    stand.until_state(State::Idle);
    assert_eq!(stand.requests("train").len(), 4);
}

#[test]
fn a_step_that_fails_or_is_skipped_is_recorded_with_its_reason() {
    let stand = Stand::start(&[("fail_step", "1"), ("skip_step", "2")]);
    let ids = stand.add(5);
    stand.wait_for(&ids[4..], ExampleState::Trained);
    let failed = stand.get(&ids[0]);
    assert_eq!((failed.state, failed.reason.as_deref()), (ExampleState::Failed, Some("out of memory")));
    let skipped = stand.get(&ids[2]);
    assert_eq!((skipped.state, skipped.reason.as_deref()), (ExampleState::Skipped, Some("loss below train.loss_min")));
    assert_eq!(stand.handle.status().restarts, 0);
}

#[test]
fn an_answer_to_another_step_ends_the_trainer_and_counts_for_nothing() {
    let stand = Stand::start(&[("wrong_step", "")]);
    let ids = stand.add(2);
    stand.wait_for(&ids, ExampleState::Trained);
    let status = stand.handle.status();
    assert_eq!(status.restarts, 1);
    assert!(status.last_restart.as_ref().unwrap().contains("it answered step 2"), "{status}");
    assert_eq!(stand.requests("train").len(), 2);
}

#[test]
fn a_server_that_is_gone_is_waited_for_without_counting_as_a_death() {
    let stand = Stand::start(&[("no_server", "")]);
    let ids = stand.add(1);
    stand.until_state(State::WaitingForServer);
    let status = stand.handle.status();
    assert_eq!((status.restarts, status.detail.as_deref()), (0, Some("nothing listens on the socket")));
    assert!(status.to_string().contains("waiting for server"), "{status}");
    let error = block_on(stand.handle.sync("test")).unwrap_err();
    assert!(matches!(error, ControlError::NotReady { .. }), "{error}");
    std::fs::remove_file(stand.dir.path().join("no_server")).unwrap();
    stand.wait_for(&ids, ExampleState::Trained);
}

#[test]
fn syncs_asked_for_during_a_sync_share_it() {
    let stand = Stand::start(&[("sync_seconds", "0.3")]);
    let ids = stand.add(1);
    stand.wait_for(&ids, ExampleState::Trained);
    let generations: Vec<u64> = block_on(async {
        let first = stand.handle.sync("first");
        let later = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            tokio::join!(stand.handle.sync("second"), stand.handle.sync("third"))
        };
        let (first, (second, third)) = tokio::join!(first, later);
        [first, second, third].into_iter().map(|synced| synced.unwrap().generation).collect()
    });
    assert_eq!(generations, [1, 1, 1]);
    assert_eq!(stand.requests("sync").len(), 1);
}

#[test]
fn a_scheduled_sync_that_was_missed_for_years_happens_once() {
    let dir = tempfile::tempdir().unwrap();
    drop(Queue::open(&queue_path(dir.path()), 1).unwrap());
    let connection = rusqlite::Connection::open(queue_path(dir.path())).unwrap();
    connection.execute("UPDATE numbers SET value = 1000 WHERE name = 'last_sync_ms'", []).unwrap();
    let stand = Stand::start_in(dir, &[]);
    // Due since January 1971; with nothing trained there is nothing to write, and the next one is in the future.
    stand.until("a next sync in the future", || {
        stand.handle.status().next_sync.is_some_and(|due| due > chrono::Utc::now().to_rfc3339())
    });
    assert_eq!(stand.requests("sync").len(), 0);
}

#[test]
fn a_missed_sync_waits_for_the_replay_and_happens_once() {
    let dir = tempfile::tempdir().unwrap();
    let queue = Queue::open(&queue_path(dir.path()), 10).unwrap();
    drop(queue);
    let mut stand = Stand::start_in(dir, &[("step_seconds", "0")]);
    let ids = stand.add(6);
    stand.wait_for(&ids, ExampleState::Trained);
    // The daemon dies without a sync: its trainer forgets, its queue remembers.
    stand.order("sync_seconds", "0");
    stand.stop();
    for name in ["cursor", "generation", "step", "log"] {
        std::fs::remove_file(stand.dir.path().join(name)).unwrap();
    }
    let dir = std::mem::replace(&mut stand.dir, tempfile::tempdir().unwrap());
    let connection = rusqlite::Connection::open(queue_path(dir.path())).unwrap();
    connection
        .execute_batch(
            "UPDATE numbers SET value = 1000 WHERE name = 'last_sync_ms';
             UPDATE numbers SET value = 0 WHERE name = 'synced_cursor';",
        )
        .unwrap();
    drop(connection);
    let stand = Stand::start_in(dir, &[]);
    stand.until("the sync", || stand.handle.status().last_sync.is_some());
    stand.until_state(State::Idle);
    let log = stand.log();
    let kinds: Vec<&str> = log
        .lines()
        .map(|line| {
            if line.contains("train") {
                "train"
            } else if line == "start" {
                line
            } else {
                "sync"
            }
        })
        .collect();
    assert_eq!(kinds, ["start", "train", "train", "train", "sync"], "{log}");
    assert!(stand.requests("sync")[0].contains("schedule"));
}

#[test]
fn a_paused_daemon_takes_examples_and_syncs_but_does_not_train() {
    let stand = Stand::start(&[]);
    stand.until_state(State::Idle);
    stand.handle.pause(true);
    stand.until_state(State::Paused);
    let ids = stand.add(1);
    block_on(stand.handle.sync("test")).unwrap();
    assert_eq!(stand.get(&ids[0]).state, ExampleState::Queued);
    stand.handle.pause(false);
    stand.wait_for(&ids, ExampleState::Trained);
}

#[test]
fn steps_that_keep_failing_pause_training_instead_of_emptying_the_queue() {
    let stand = Stand::start(&[]);
    stand.until_state(State::Idle);
    // Each step fails as it comes.
    let ids = stand.add(0);
    assert!(ids.is_empty());
    let mut all = Vec::new();
    for step in 1..=FAILURES_MAX {
        stand.order("fail_step", &step.to_string());
        let ids = stand.add(1);
        stand.wait_for(&ids, ExampleState::Failed);
        all.extend(ids);
    }
    stand.until_state(State::Paused);
    let waiting = stand.add(1);
    let detail = stand.handle.status().detail.unwrap();
    assert!(detail.contains("5 steps failed in a row") && detail.contains("out of memory"), "{detail}");
    assert_eq!(stand.get(&waiting[0]).state, ExampleState::Queued);
    stand.handle.pause(false);
    stand.wait_for(&waiting, ExampleState::Trained);
}

#[test]
fn a_rollback_takes_its_examples_back_and_one_that_fails_changes_nothing() {
    let stand = Stand::start(&[]);
    for _ in 0..3 {
        let ids = stand.add(1);
        stand.wait_for(&ids, ExampleState::Trained);
        block_on(stand.handle.sync("test")).unwrap();
    }
    let error = block_on(stand.handle.rollback(9)).unwrap_err();
    assert_eq!(error, ControlError::Failed("there is no such generation".into()));
    let done = block_on(stand.handle.rollback(1)).unwrap();
    assert_eq!((done.generation, done.cursor), (4, 1));
    let status = stand.handle.status();
    assert_eq!((status.generation, status.cursor), (Some(4), Some(1)));
    assert_eq!((status.queue["trained"], status.queue["rolled_back"]), (1, 2));
    let ids = stand.add(1);
    stand.wait_for(&ids, ExampleState::Trained);
    assert_eq!(stand.get(&ids[0]).seq, Some(4));
}

#[test]
fn what_harmed_the_model_is_put_aside_and_nothing_more_is_trained_until_somebody_looked() {
    let stand = Stand::start(&[]);
    let good = stand.add(1);
    stand.wait_for(&good, ExampleState::Trained);
    block_on(stand.handle.sync("test")).unwrap();
    stand.order("fail_step", "3");
    let bad = stand.add(1);
    stand.wait_for(&bad, ExampleState::Trained);
    let failed = stand.add(1);
    stand.wait_for(&failed, ExampleState::Failed);
    stand.order("harm", "");
    let error = block_on(stand.handle.sync("test")).unwrap_err();
    let ControlError::Harmed(said) = error else { panic!("{error}") };
    assert!(said.contains("took back what was trained since generation 1: the loss rose"), "{said}");
    stand.until_state(State::Paused);
    let waiting = stand.add(1);
    let status = stand.handle.status();
    assert_eq!(status.detail.as_ref(), Some(&said), "{status}");
    assert_eq!((status.generation, status.cursor, status.step, status.weight_version), (Some(1), Some(1), 1, 9));
    assert_eq!((status.counts.harmed, status.to_replay), (1, 0));
    let guard = status.guard.as_ref().unwrap();
    assert_eq!((guard.harmed.as_deref(), guard.probed.rise), (Some("the loss rose"), None));
    assert!(status.to_string().contains("2 probes, loss not finite"), "{status}");
    let record = stand.get(&bad[0]);
    assert_eq!((record.state, record.reason.as_deref()), (ExampleState::Quarantined, Some("the loss rose")));
    assert_eq!(stand.get(&good[0]).state, ExampleState::Trained);
    assert_eq!(stand.get(&failed[0]).state, ExampleState::Failed, "it had no effect");
    // Neither a rollback nor a new trainer makes anything else of it.
    block_on(stand.handle.rollback(0)).unwrap();
    assert_eq!(stand.get(&bad[0]).state, ExampleState::Quarantined);
    assert_eq!(stand.get(&waiting[0]).state, ExampleState::Queued);
    stand.handle.pause(false);
    stand.wait_for(&waiting, ExampleState::Trained);
    assert_eq!(stand.requests("train").len(), 4, "each once:\n{}", stand.log());
}

#[test]
fn harm_at_the_end_is_put_aside_too_and_the_next_daemon_waits_for_somebody_to_look() {
    let mut stand = Stand::start(&[]);
    let ids = stand.add(1);
    stand.wait_for(&ids, ExampleState::Trained);
    stand.order("harm", "");
    stand.stop();
    assert_eq!(stand.get(&ids[0]).state, ExampleState::Quarantined);
    let last = stand.handle.status().last_sync.unwrap();
    assert_eq!((last.harmed, last.failed.as_deref()), (true, Some("the loss rose")));

    let mut stand = Stand::start_in(std::mem::replace(&mut stand.dir, tempfile::tempdir().unwrap()), &[]);
    stand.until_state(State::Paused);
    assert!(stand.handle.status().detail.unwrap().contains("the loss rose"));
    let waiting = stand.add(1);
    stand.handle.pause(false);
    stand.wait_for(&waiting, ExampleState::Trained);
    stand.stop();
    let stand = Stand::start_in(std::mem::replace(&mut stand.dir, tempfile::tempdir().unwrap()), &[]);
    stand.until_state(State::Idle);
}

#[test]
fn harm_that_cannot_be_taken_back_stops_training_and_is_looked_for_again() {
    let stand = Stand::start(&[("not_restored", "the files are damaged")]);
    let ids = stand.add(1);
    stand.wait_for(&ids, ExampleState::Trained);
    stand.order("harm", "");
    let error = block_on(stand.handle.sync("test")).unwrap_err().to_string();
    assert!(
        error.contains("could not take it back: the files are damaged") && error.contains("the loss rose"),
        "{error}"
    );
    stand.until_state(State::Paused);
    assert_eq!(stand.get(&ids[0]).state, ExampleState::Trained, "the live weights hold it still");
    assert!(!stand.handle.status().last_sync.unwrap().harmed, "nothing was taken back");
    stand.handle.pause(true);
    assert!(
        stand.handle.status().detail.unwrap().contains("could not take it back"),
        "a pause on request hides nothing"
    );
    stand.handle.pause(false);
    let done = block_on(stand.handle.sync("test")).unwrap();
    assert_eq!(done.cursor, 1);
}

#[test]
fn a_trainer_that_ends_before_its_last_sync_is_said() {
    let mut stand = Stand::start(&[("sync_seconds", "3")]);
    let ids = stand.add(1);
    stand.wait_for(&ids, ExampleState::Trained);
    stand.handle.shutdown();
    stand.until("the last sync to begin", || !stand.requests("shutdown").is_empty());
    let pid = stand.handle.status().trainer_pid.unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), rustix::process::Signal::KILL)
        .unwrap();
    stand.stop();
    let last = stand.handle.status().last_sync.unwrap();
    assert_eq!((last.harmed, last.failed.as_deref()), (false, Some("the trainer ended before it was done")));
}

#[test]
fn a_trainer_that_cannot_start_is_said_and_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let queue = Arc::new(Queue::open(&queue_path(dir.path()), 1).unwrap());
    let options = Options {
        command: ChildCommand { program: "/nonexistent/trainer".into(), arguments: Vec::new() },
        model: "fake".into(),
        batch_examples: 1,
        workers: 1,
        duty_cycle: 1.0,
        schedule: Schedule::parse("* * * * *", "UTC").unwrap(),
        sync_on_shutdown: true,
        restart_delay: Duration::from_millis(1),
        server_delay: Duration::from_millis(1),
        queue_delay: Duration::from_millis(1),
        files: None,
        silence_max: Duration::from_secs(1),
    };
    let (handle, thread) = start(options, queue).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while handle.status().restarts < 3 {
        assert!(Instant::now() < deadline, "{}", handle.status());
        std::thread::sleep(Duration::from_millis(2));
    }
    let status = handle.status();
    assert_eq!(status.state, State::Failed);
    assert!(status.detail.as_ref().unwrap().contains("/nonexistent/trainer cannot be started"), "{status}");
    handle.shutdown();
    thread.join().unwrap();
}

#[test]
fn a_full_disk_stops_new_steps_alone_and_nothing_is_trained_twice() {
    let stand = Stand::start(&[]);
    stand.until_state(State::Idle);
    stand.handle.pause(true);
    stand.until_state(State::Paused);
    let ids = stand.add(400);
    stand.queue.allow_growth(false);
    stand.handle.pause(false);
    stand.until_state(State::WaitingForQueue);
    let status = stand.handle.status();
    let detail = status.detail.as_ref().unwrap();
    assert!(detail.contains("queue.sqlite: no room on its file system"), "{status}");
    assert!(!status.state.is_ready() && status.to_string().contains("waiting for queue"), "{status}");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(stand.handle.status().step, status.step, "it goes on without room");
    // The files are on another disk, or have room of their own.
    block_on(stand.handle.sync("test")).unwrap();

    stand.queue.allow_growth(true);
    stand.wait_for(&ids, ExampleState::Trained);
    stand.until_state(State::Idle);
    assert_eq!(stand.requests("train").len(), 200, "each step once");
    let starts = stand.log().lines().filter(|line| *line == "start").count();
    assert_eq!((starts, stand.handle.status().restarts), (1, 0));
}

#[test]
fn before_a_trainer_speaks_the_status_says_what_the_files_hold_and_no_more() {
    let orders = [("no_server", ""), ("cursor", "2"), ("generation", "3"), ("step", "1")];
    let files = Files { generation: 3, cursor: 2, step: 1 };
    let stand = Stand::start_on(tempfile::tempdir().unwrap(), &orders, Some(files), 1, 1.0);
    stand.until_state(State::WaitingForServer);
    let status = stand.handle.status();
    assert_eq!((status.generation, status.cursor, status.step), (Some(3), Some(2), 1));
    assert_eq!((status.parameters, status.trainable), (None, None));
    let text = status.to_string();
    assert!(text.contains("files: generation 3, cursor 2") && !text.contains("parameters"), "{text}");
    let fresh = Stand::start(&[("no_server", "")]);
    fresh.until_state(State::WaitingForServer);
    assert_eq!(fresh.handle.status().generation, None);
    assert!(fresh.handle.status().to_string().contains("files: no generation yet"), "{}", fresh.handle.status());
}

#[test]
fn what_will_be_trained_again_is_told_apart_from_what_is_learned() {
    let stand = Stand::start(&[]);
    let first = stand.add(2);
    stand.wait_for(&first, ExampleState::Trained);
    block_on(stand.handle.sync("test")).unwrap();
    let second = stand.add(3);
    stand.wait_for(&second, ExampleState::Trained);
    stand.until_state(State::Idle);
    assert_eq!(stand.handle.status().to_replay, 0);
    // The server goes, and with it what was not synced.
    stand.order("no_server", "");
    stand.order("die_at_step", "4");
    stand.add(1);
    stand.until_state(State::WaitingForServer);
    let status = stand.handle.status();
    assert_eq!((status.to_replay, status.queue["trained"]), (3, 5));
    assert!(status.to_string().contains("3 of the trained ones will be trained again"), "{status}");
    std::fs::remove_file(stand.dir.path().join("no_server")).unwrap();
    stand.until("the replay to end", || stand.handle.status().queue["trained"] == 6);
    stand.until_state(State::Idle);
    assert_eq!(stand.handle.status().to_replay, 0);
}
