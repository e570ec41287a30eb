use super::*;

fn example(first: u32) -> NewExample {
    NewExample {
        ids: vec![first, 2, 3],
        spans: std::iter::once(1..3).collect(),
        weight: 1.0,
        priority: 0,
        tags: vec!["t".into()],
        source: None,
        lr: None,
        job: None,
    }
}

fn queue() -> (tempfile::TempDir, Queue) {
    let dir = tempfile::tempdir().unwrap();
    let queue = Queue::open(&dir.path().join("deep/queue.sqlite"), 10).unwrap();
    (dir, queue)
}

fn add(queue: &Queue, examples: &[NewExample]) -> Vec<String> {
    match queue.add(examples, None, |_| unreachable!("no key")).unwrap() {
        Added::New(ids) => ids,
        Added::Before(..) => panic!("no key was given"),
    }
}

fn trained(queue: &Queue, batch: &Batch) {
    let results: Vec<ExampleResult> =
        batch.examples.iter().map(|e| ExampleResult { seq: e.seq, loss: Some(0.5), tokens: 2 }).collect();
    queue.record_trained(&results, batch.step, None).unwrap();
}

fn firsts(batch: &Batch) -> Vec<u32> {
    batch.examples.iter().map(|example| example.ids[0]).collect()
}

#[test]
fn higher_priority_goes_first_and_arrival_decides_between_equals() {
    let (_dir, queue) = queue();
    let urgent = |first| NewExample { priority: 1, ..example(first) };
    add(&queue, &[example(1), urgent(2), example(3), urgent(4)]);
    assert_eq!(firsts(&queue.take(4).unwrap().unwrap()), [2, 4, 1, 3]);
}

#[test]
fn a_minute_of_waiting_is_worth_one_priority() {
    let (_dir, queue) = queue();
    add(&queue, &[example(1)]);
    let age = |ms: i64| queue.lock().execute("UPDATE examples SET place = place - ?1", [ms]).unwrap();
    age(2 * AGEING_MS + 1000);
    add(&queue, &[NewExample { priority: 2, ..example(2) }, NewExample { priority: 3, ..example(3) }]);
    assert_eq!(firsts(&queue.take(3).unwrap().unwrap()), [3, 1, 2]);
}

#[test]
fn everything_survives_reopening_and_a_step_in_flight_is_replayed_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sqlite");
    let queue = Queue::open(&path, 10).unwrap();
    add(&queue, &[example(1), example(2), example(3)]);
    let batch = queue.take(2).unwrap().unwrap();
    assert_eq!((batch.step, batch.examples[0].seq, batch.examples[1].seq), (1, 1, 2));
    drop(queue);

    let queue = Queue::open(&path, 10).unwrap();
    assert_eq!(queue.replay(0).unwrap().unwrap(), batch);
    let next = queue.take(2).unwrap().unwrap();
    assert_eq!((next.step, next.examples[0].seq, firsts(&next)), (2, 3, vec![3]));
}

#[test]
fn replay_goes_on_from_the_cursor_batch_by_batch_until_nothing_is_left() {
    let (_dir, queue) = queue();
    add(&queue, &(1..=5).map(example).collect::<Vec<_>>());
    let batches: Vec<Batch> = (0..3).map(|_| queue.take(2).unwrap().unwrap()).collect();
    batches[..2].iter().for_each(|batch| trained(&queue, batch));
    assert!(queue.take(2).unwrap().is_none());

    let mut cursor = 2;
    let mut replayed = Vec::new();
    while let Some(batch) = queue.replay(cursor).unwrap() {
        cursor = batch.examples.last().unwrap().seq;
        replayed.push(batch);
    }
    assert_eq!(replayed, batches[1..]);
}

#[test]
fn what_failed_is_not_replayed() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[example(1), example(2)]);
    let first = queue.take(1).unwrap().unwrap();
    let second = queue.take(1).unwrap().unwrap();
    queue.record_failed(first.step, "out of memory").unwrap();
    assert_eq!(queue.replay(0).unwrap().unwrap(), second);
    let record = queue.get(&ids[0]).unwrap().unwrap();
    assert_eq!((record.state, record.reason.as_deref()), (State::Failed, Some("out of memory")));
}

#[test]
fn a_record_says_what_came_of_an_example() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[example(1), example(2)]);
    let batch = queue.take(1).unwrap().unwrap();
    trained(&queue, &batch);
    let second = queue.take(1).unwrap().unwrap();
    let result = ExampleResult { seq: second.examples[0].seq, loss: None, tokens: 2 };
    queue.record_trained(&[result], 1, Some("loss is not finite")).unwrap();

    let record = queue.get(&ids[0]).unwrap().unwrap();
    assert_eq!(
        (record.state, record.loss, record.step, record.weight_version),
        (State::Trained, Some(0.5), Some(1), Some(1))
    );
    assert_eq!((record.tokens, record.decision_tokens, record.tags), (3, 2, vec!["t".to_owned()]));
    assert!(!record.in_files);
    let record = queue.get(&ids[1]).unwrap().unwrap();
    assert_eq!((record.state, record.reason.as_deref()), (State::Skipped, Some("loss is not finite")));
    queue.record_synced(1, 2, || None).unwrap();
    assert!(queue.get(&ids[0]).unwrap().unwrap().in_files);
    assert!(!queue.get(&ids[1]).unwrap().unwrap().in_files, "a skipped example left no trace in the files");
    assert!(queue.get("nonsense").unwrap().is_none());
}

#[test]
fn a_full_queue_takes_nothing_and_says_how_full_it_is() {
    let (_dir, queue) = queue();
    add(&queue, &vec![example(1); 9]);
    let error = queue.add(&[example(1), example(2)], None, |_| unreachable!()).unwrap_err();
    assert!(matches!(error, QueueError::Full { waiting: 9, wanted: 2, capacity: 10 }), "{error}");
    assert_eq!(queue.counts().unwrap()[0], (State::Queued, 9));
    queue.take(1).unwrap();
    add(&queue, &[example(1), example(2)]);
}

#[test]
fn the_same_key_with_the_same_body_gives_the_same_answer_and_adds_nothing() {
    let (_dir, queue) = queue();
    let key = |byte| Idempotency { key: "k".into(), body: [byte; 32] };
    let answer = |ids: &[String]| (202, ids.join(","));
    let Added::New(ids) = queue.add(&[example(1)], Some(&key(1)), answer).unwrap() else { panic!() };
    assert_eq!(queue.add(&[example(1)], Some(&key(1)), answer).unwrap(), Added::Before(202, ids[0].clone()));
    assert_eq!(queue.before(&key(1)).unwrap(), Some(Added::Before(202, ids[0].clone())));
    assert_eq!(queue.counts().unwrap()[0], (State::Queued, 1));
    assert!(
        matches!(queue.add(&[example(1)], Some(&key(2)), answer).unwrap_err(), QueueError::KeyReused(k) if k == "k")
    );
    assert!(matches!(queue.before(&key(2)).unwrap_err(), QueueError::KeyReused(_)));
}

#[test]
fn a_batch_shares_its_lr_and_a_jobs_example_is_alone() {
    let (_dir, queue) = queue();
    let with_lr = |first, lr| NewExample { lr: Some(lr), ..example(first) };
    let of_job = |first| NewExample { job: Some("j".into()), ..example(first) };
    add(&queue, &[example(1), example(2), with_lr(3, 0.5), of_job(4), of_job(5), example(6)]);
    let mut batches = Vec::new();
    while let Some(batch) = queue.take(4).unwrap() {
        batches.push((batch.lr, firsts(&batch)));
    }
    assert_eq!(batches, [(None, vec![1, 2]), (Some(0.5), vec![3]), (None, vec![4]), (None, vec![5]), (None, vec![6])]);
    assert_eq!(queue.job("j").unwrap().iter().map(|record| record.step).collect::<Vec<_>>(), [Some(3), Some(4)]);
}

#[test]
fn a_rollback_takes_back_what_came_after_its_cursor_and_seqs_go_on() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[example(1), example(2), example(3)]);
    (0..2).for_each(|_| trained(&queue, &queue.take(1).unwrap().unwrap()));
    queue.record_synced(1, 2, || None).unwrap();
    assert_eq!(queue.record_rolled_back(7, 1).unwrap(), 1);
    assert_eq!(queue.get(&ids[0]).unwrap().unwrap().state, State::Trained);
    let record = queue.get(&ids[1]).unwrap().unwrap();
    assert_eq!((record.state, record.reason.as_deref()), (State::RolledBack, Some("rolled back to generation 7")));
    assert!(queue.replay(1).unwrap().is_none());
    assert_eq!(queue.take(1).unwrap().unwrap().examples[0].seq, 3);
}

#[test]
fn a_cursor_behind_a_synced_one_is_a_rollback_that_nobody_reported() {
    let (_dir, queue) = queue();
    add(&queue, &[example(1), example(2), example(3)]);
    (0..3).for_each(|_| trained(&queue, &queue.take(1).unwrap().unwrap()));
    queue.record_synced(1, 2, || None).unwrap();
    assert_eq!(queue.reconcile(5, 2, 2).unwrap(), 0, "a restart at the synced cursor replays");
    assert!(queue.replay(2).unwrap().is_some());
    assert_eq!(queue.reconcile(5, 1, 1).unwrap(), 2);
    assert!(queue.replay(1).unwrap().is_none());
}

#[test]
fn a_new_queue_beside_older_files_goes_on_after_their_cursor() {
    let (_dir, queue) = queue();
    add(&queue, &[example(1)]);
    queue.reconcile(4, 70, 50).unwrap();
    let batch = queue.take(1).unwrap().unwrap();
    assert_eq!((batch.examples[0].seq, batch.step), (71, 51));
}

#[test]
fn what_became_too_long_while_it_waited_is_refused() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[example(1)]);
    assert_eq!(queue.refuse_longer_than(3).unwrap(), 0);
    assert_eq!(queue.refuse_longer_than(2).unwrap(), 1);
    let record = queue.get(&ids[0]).unwrap().unwrap();
    let reason = "3 tokens, at most 2 are taken now (train.max_tokens)";
    assert_eq!((record.state, record.reason.as_deref()), (State::Refused, Some(reason)));
    assert!(queue.take(1).unwrap().is_none());
}

#[test]
fn a_damaged_file_is_refused_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sqlite");
    std::fs::write(&path, "this was a queue once, before the disk lied about it".repeat(100)).unwrap();
    let Err(error) = Queue::open(&path, 1) else { panic!("opened") };
    assert!(matches!(error, QueueError::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains("move it away"), "{error}");
}

#[test]
fn a_file_of_an_older_version_keeps_its_examples() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sqlite");
    let queue = Queue::open(&path, 9).unwrap();
    let ids = add(&queue, &[example(1)]);
    drop(queue);
    // As the first version left it.
    let connection = Connection::open(&path).unwrap();
    connection
        .execute_batch("DROP TABLE pause; DROP TABLE forgetting; DROP TABLE forget_to; DROP INDEX by_source; DROP INDEX by_generation;
             ALTER TABLE examples DROP COLUMN generation; PRAGMA user_version = 1;")
        .unwrap();
    drop(connection);
    let queue = Queue::open(&path, 9).unwrap();
    assert_eq!(queue.get(&ids[0]).unwrap().unwrap().state, State::Queued);
    queue.record_paused("why").unwrap();
    assert_eq!(queue.pause().unwrap().as_deref(), Some("why"));
}

#[test]
fn a_file_of_a_newer_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sqlite");
    drop(Queue::open(&path, 1).unwrap());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let Err(error) = Queue::open(&path, 1) else { panic!("opened") };
    assert!(error.to_string().contains("schema 99"), "{error}");
}

#[test]
fn the_file_is_written_ahead_and_synced_in_full() {
    let (_dir, queue) = queue();
    let pragma = |name: &str| -> String {
        let value: rusqlite::types::Value = queue.lock().pragma_query_value(None, name, |row| row.get(0)).unwrap();
        format!("{value:?}")
    };
    assert_eq!(pragma("journal_mode"), "Text(\"wal\")");
    assert_eq!(pragma("synchronous"), "Integer(2)");
}

#[test]
fn ids_are_distinct() {
    let ids: std::collections::HashSet<String> = (0..1000).map(|_| new_id()).collect();
    assert_eq!(ids.len(), 1000);
    assert!(ids.iter().all(|id| id.len() == 26));
}

#[test]
fn a_full_disk_is_named_with_the_file_and_nothing_is_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.sqlite");
    let queue = Queue::open(&path, 10_000).unwrap();
    queue.allow_growth(false);
    let many: Vec<NewExample> = (0..2000).map(example).collect();
    let error = queue.add(&many, None, |_| unreachable!("no key")).unwrap_err();
    assert!(matches!(&error, QueueError::NoRoom { path: named, .. } if *named == path), "{error}");
    assert!(error.to_string().starts_with(&format!("queue {}: no room", path.display())), "{error}");
    assert!(queue.counts().unwrap().iter().all(|(_, count)| *count == 0));
    queue.allow_growth(true);
    assert_eq!(add(&queue, &many).len(), 2000);
}

#[test]
fn what_was_posted_is_for_the_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, queue) = queue();
    add(&queue, &[example(1)]);
    let mode = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    for name in ["deep/queue.sqlite", "deep/queue.sqlite-wal", "deep/queue.sqlite-shm"] {
        assert_eq!(mode(name), 0o600, "{name}");
    }
    assert_eq!(mode("deep"), 0o700);
}

#[test]
fn a_step_in_the_files_whose_outcome_was_never_written_down_counts_as_trained() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[example(1), example(2)]);
    queue.take(1).unwrap().unwrap();
    queue.take(1).unwrap().unwrap();
    queue.reconcile(1, 1, 1).unwrap();
    let state = |id: &str| queue.get(id).unwrap().unwrap().state;
    assert_eq!((state(&ids[0]), state(&ids[1])), (State::Trained, State::Training));
    assert_eq!(firsts(&queue.replay(1).unwrap().unwrap()), [2]);
}

#[test]
fn what_did_harm_is_what_the_judged_weights_held_and_nothing_else() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[0; 6].map(example));
    for _ in 0..6 {
        let batch = queue.take(1).unwrap().unwrap();
        let seq = batch.examples[0].seq;
        queue.record_trained(&[ExampleResult { seq, loss: Some(1.0), tokens: 2 }], seq, None).unwrap();
        if seq == 2 {
            queue.record_synced(1, 2, || None).unwrap();
        }
        if seq == 3 {
            // Somebody went back: 3 is in nobody's weights.
            queue.record_rolled_back(2, 2).unwrap();
        }
    }
    // A replay had come as far as 5 when the weights were judged.
    assert_eq!(queue.record_quarantined(2, 5, "harm", "why").unwrap(), 2);
    let state = |i: usize| queue.get(&ids[i]).unwrap().unwrap().state;
    assert_eq!([0, 1, 2].map(state), [State::Trained, State::Trained, State::RolledBack]);
    assert_eq!([3, 4, 5].map(state), [State::Quarantined, State::Quarantined, State::Trained]);
    let replay = queue.replay(2).unwrap().unwrap();
    assert_eq!(replay.examples.iter().map(|example| example.seq).collect::<Vec<_>>(), [6]);
    let listed: Vec<String> = queue.in_state(State::Quarantined, 9).unwrap().into_iter().map(|e| e.id).collect();
    assert_eq!(listed, [ids[4].clone(), ids[3].clone()], "the newest first");
    assert_eq!(queue.in_state(State::Quarantined, 1).unwrap().len(), 1);
    // A rollback leaves them what they are.
    queue.record_rolled_back(0, 0).unwrap();
    assert_eq!([0, 3, 5].map(state), [State::RolledBack, State::Quarantined, State::RolledBack]);
    assert_eq!(queue.pause().unwrap().as_deref(), Some("why"));
    queue.record_paused("another").unwrap();
    assert_eq!(queue.pause().unwrap().as_deref(), Some("another"));
    queue.record_resumed().unwrap();
    assert_eq!(queue.pause().unwrap(), None);
}

/// Hands out and trains what waits, one a step; the first token and the step of each.
fn train_all(queue: &Queue) -> Vec<(u32, u64)> {
    std::iter::from_fn(|| queue.take(1).unwrap())
        .map(|batch| {
            trained(queue, &batch);
            (batch.examples[0].ids[0], batch.step)
        })
        .collect()
}

fn of(ids: &[&String]) -> Forget {
    Forget::Examples(ids.iter().map(|id| (*id).clone()).collect())
}

/// A generation to go back to, none of which' successors is held.
fn base(generation: u64, cursor: u64) -> Base {
    Base { generation, cursor, current: generation, undone: Vec::new() }
}

#[test]
fn what_comes_after_a_forgotten_example_is_trained_again_in_the_same_order_and_by_the_steps_without_it() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &(1..=6).map(example).collect::<Vec<_>>());
    train_all(&queue);
    queue.record_synced(1, 2, || None).unwrap();
    let what = of(&[&ids[3]]);
    let plan = queue.plan_forget(&what).unwrap();
    assert_eq!((plan.examples, plan.generations, plan.unsynced), (1, Vec::new(), true));
    assert_eq!(queue.plan_forget(&of(&[&ids[0]])).unwrap().generations, [1]);
    assert_eq!(queue.begin_forget(&what, &base(1, 2)).unwrap(), 3);
    add(&queue, &[NewExample { priority: 1000, ..example(9) }]);
    queue.finish_forget(2, 2).unwrap();

    let forgotten = queue.get(&ids[3]).unwrap().unwrap();
    assert_eq!((forgotten.state, forgotten.reason.as_deref()), (State::Forgotten, Some("forgotten on request")));
    assert_eq!(queue.scoring(&ids[3]).unwrap(), None, "its tokens are gone");
    let first = queue.take(1).unwrap().unwrap();
    trained(&queue, &first);
    assert_eq!((firsts(&first), first.step), (vec![3], 3));
    assert_eq!(queue.withdraw(None).unwrap(), 1, "what was trained before is not withdrawn");
    add(&queue, &[NewExample { priority: 1000, ..example(9) }]);

    // And one of these, before all of them had their turn again.
    let what = of(&[&ids[2]]);
    assert!(queue.plan_forget(&what).unwrap().unsynced);
    queue.begin_forget(&what, &base(1, 2)).unwrap();
    queue.finish_forget(2, 2).unwrap();
    assert_eq!(train_all(&queue), [(5, 3), (6, 4), (9, 5)], "before all that waits for its first time");
    assert!(queue.replay(2).unwrap().is_some(), "and they count as any others");
}

#[test]
fn what_was_never_trained_is_forgotten_where_it_lies() {
    let (_dir, queue) = queue();
    let from = |source: &str, first| NewExample { source: Some(source.into()), ..example(first) };
    let ids = add(&queue, &[from("a", 1), from("b", 2), from("a", 3)]);
    let what = Forget::Source("a".into());
    let plan = queue.plan_forget(&what).unwrap();
    assert_eq!((plan.examples, plan.generations, plan.unsynced), (2, Vec::new(), false));
    queue.forget_unheld(&what).unwrap();
    assert_eq!(queue.get(&ids[0]).unwrap().unwrap().state, State::Forgotten);
    assert_eq!(queue.plan_forget(&what).unwrap().examples, 0, "once is enough");
    assert_eq!(train_all(&queue), [(2, 1)]);
}

#[test]
fn a_daemon_that_ended_while_it_forgot_knows_by_the_files_how_far_it_came() {
    let reopened = |queue: Queue, dir: &tempfile::TempDir| {
        drop(queue);
        Queue::open(&dir.path().join("deep/queue.sqlite"), 10).unwrap()
    };
    let started = || {
        let (dir, queue) = queue();
        let ids = add(&queue, &(1..=4).map(example).collect::<Vec<_>>());
        trained(&queue, &queue.take(1).unwrap().unwrap());
        queue.record_synced(1, 1, || None).unwrap();
        train_all(&queue);
        queue.record_synced(2, 4, || None).unwrap();
        assert_eq!(queue.plan_forget(&of(&[&ids[1]])).unwrap().generations, [2]);
        let base = Base { generation: 1, cursor: 1, current: 2, undone: vec![2] };
        assert_eq!(queue.begin_forget(&of(&[&ids[1]]), &base).unwrap(), 2);
        (reopened(queue, &dir), dir)
    };
    // The files went back.
    let (queue, _dir) = started();
    assert_eq!(queue.reconcile(3, 1, 1).unwrap(), 0, "nothing counts as rolled back");
    assert_eq!(train_all(&queue), [(3, 2), (4, 3)]);
    assert_eq!(queue.holds_forgotten(&[3, 2, 1]).unwrap(), Some(2), "and nobody goes back to what holds it");
    assert_eq!(queue.holds_forgotten(&[3, 1]).unwrap(), None);

    // They did not.
    let (queue, _dir) = started();
    queue.reconcile(2, 4, 4).unwrap();
    assert_eq!(train_all(&queue), []);
    assert_eq!(queue.made(2).unwrap().len(), 3);
    // And the note is gone: a later rollback is one.
    assert_eq!(queue.reconcile(3, 1, 1).unwrap(), 3);

    // Somebody rolled them back to somewhere else meanwhile.
    let (queue, _dir) = started();
    assert_eq!(queue.reconcile(3, 0, 0).unwrap(), 4);
    assert_eq!(train_all(&queue), []);
}

#[test]
fn what_a_restorable_generation_was_made_of_stays_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let queue = Queue::open(&dir.path().join("queue.sqlite"), 1 << 20).unwrap();
    let old = add(&queue, &(1..=4).map(example).collect::<Vec<_>>());
    for generation in 1..=2 {
        (0..2).for_each(|_| trained(&queue, &queue.take(1).unwrap().unwrap()));
        queue.record_synced(generation, 2 * generation, || unreachable!("there are few")).unwrap();
    }
    add(&queue, &vec![example(5); FINISHED_KEPT as usize + 10]);
    queue.withdraw(None).unwrap();
    queue.record_synced(3, 4, || Some(2)).unwrap();
    assert_eq!(queue.get(&old[0]).unwrap(), None, "of a generation that has gone");
    assert_eq!(queue.made(2).unwrap().len(), 2);
    queue.record_synced(3, 4, || None).unwrap();
    assert_eq!(queue.made(2).unwrap().len(), 2, "what is not known does not go");
    queue.record_synced(3, 4, || Some(3)).unwrap();
    assert!(queue.made(2).unwrap().is_empty());
}

#[test]
fn a_step_number_that_is_used_again_fails_alone() {
    let (_dir, queue) = queue();
    let ids = add(&queue, &[example(1), example(2)]);
    train_all(&queue);
    queue.record_quarantined(1, 2, "harm", "pause").unwrap();
    queue.begin_forget(&of(&[&ids[0]]), &base(0, 0)).unwrap();
    queue.finish_forget(0, 0).unwrap();
    add(&queue, &[example(3), example(4)]);
    let (first, second) = (queue.take(1).unwrap().unwrap(), queue.take(1).unwrap().unwrap());
    assert_eq!((first.step, second.step), (1, 2));
    queue.record_failed(2, "out of memory").unwrap();
    assert_eq!(queue.get(&ids[1]).unwrap().unwrap().state, State::Quarantined);
}
