//! Two processes: a server that is killed, a trainer beside it, and what each of them sees.
//!
//! This program starts itself as the other process: `processes serve-export MODEL SOCKET` exports a model,
//! `processes serve-staged LIVE` maps a live copy as a server does, `processes train SOCKET` attaches and
//! writes. Each of them answers lines on its standard input and ends with it.

mod common;

use common::processes::{Other, answer, hex, run_tests};
use common::{content, decoder, model};
use ipc::{Attachment, SafetensorsDir, SharedWeights, Source, servers_of, stage};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const NAME: &str = "model.layers.0.self_attn.q_proj.weight";

const TESTS: [(&str, fn()); 7] = [
    ("bytes_written_by_another_process_are_seen_by_the_exporter", bytes_are_shared),
    ("a_killed_exporter_is_noticed_within_100_ms_by_its_pid", killed_exporter),
    ("a_watch_sleeps_until_the_exporter_is_killed", watched_exporter),
    ("a_process_that_is_dying_is_gone_before_it_is_dead", dying_exporter),
    ("a_trainer_that_is_killed_gives_the_lease_back", killed_trainer),
    ("a_server_of_a_live_copy_sees_every_write_and_its_end_is_noticed", staged_server),
    ("a_live_copy_that_is_served_is_not_staged_again", no_staging_under_a_server),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve-export", model, socket] => serve_export(Path::new(model), Path::new(socket)),
        ["serve-then-die-slowly", model, socket] => serve_then_die_slowly(Path::new(model), Path::new(socket)),
        ["serve-staged", live] => serve_staged(Path::new(live)),
        ["train", socket] => train(Path::new(socket)),
        rest => return run_tests(rest, &TESTS),
    }
    ExitCode::SUCCESS
}

fn serve_export(model: &Path, socket: &Path) {
    let weights = Arc::new(SharedWeights::load(model, &decoder(true).tensors(), None).unwrap());
    let _handle = weights.serve(socket, Arc::new(())).unwrap();
    answer(|_| hex(&weights.find(NAME).unwrap().read()));
}

/// Exports, and a moment later ends its first thread alone: as of a large process that was killed, whose memory takes
/// long to be taken down, its pidfd and its sockets say nothing.
fn serve_then_die_slowly(model: &Path, socket: &Path) {
    let weights = Arc::new(SharedWeights::load(model, &decoder(true).tensors(), None).unwrap());
    let _handle = weights.serve(socket, Arc::new(())).unwrap();
    std::thread::spawn(|| std::thread::sleep(Duration::from_secs(60)));
    println!("ready");
    std::thread::sleep(Duration::from_secs(1));
    // SAFETY: exit(2) as a system call ends this thread and nothing else; what it owns stays as it is, and other
    // threads never touch its stack.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
}

/// Maps the file privately, as transformers and llama.cpp do.
fn serve_staged(live: &Path) {
    let dir = SafetensorsDir::open(live).unwrap();
    // One byte is touched before anything is trained, so that its page is mapped already.
    let before = dir.bytes(NAME).unwrap()[0];
    assert_eq!(before, content(NAME, 1)[0]);
    answer(|_| hex(dir.bytes(NAME).unwrap()));
}

fn train(socket: &Path) {
    let attachment = Attachment::open(&Source::Socket(socket.to_owned()), &decoder(true).tensors()).unwrap();
    answer(|line| {
        let value: u8 = line.parse().unwrap();
        attachment.check().unwrap();
        attachment.find(NAME).unwrap().write(2, &[value, value]);
        "written".into()
    });
}

fn bytes_are_shared() {
    let (dir, model, _) = model(true);
    let socket = dir.path().join("s");
    let mut server = Other::start(&[Path::new("serve-export"), &model, &socket]);
    let mut trainer = Other::start(&[Path::new("train"), &socket]);
    let mut want = content(NAME, 128);
    assert_eq!(server.ask("read"), hex(&want));
    assert_eq!(trainer.ask("171"), "written");
    want[2..4].fill(171);
    assert_eq!(server.ask("read"), hex(&want));
}

fn killed_exporter() {
    let (dir, model, expected) = model(true);
    let socket = dir.path().join("s");
    let mut server = Other::start(&[Path::new("serve-export"), &model, &socket]);
    let attachment = Attachment::open(&Source::Socket(socket.clone()), &expected).unwrap();
    let pid = server.child.id();
    assert_eq!(attachment.pid(), Some(pid));
    attachment.ping(Duration::from_secs(5)).unwrap();
    // Not reaped yet: a zombie is gone as well.
    server.child.kill().unwrap();
    let killed = Instant::now();
    let gone = loop {
        match attachment.check() {
            Err(gone) => break gone,
            Ok(()) => assert!(killed.elapsed() < Duration::from_millis(100), "not noticed within 100 ms"),
        }
    };
    assert_eq!(gone.pid, Some(pid));
    assert!(gone.to_string().contains(&format!("pid {pid}")), "{gone}");
    server.kill();
    assert!(attachment.check().is_err(), "a server that is gone stays gone");
    // The socket is still there; a new server replaces it and can be attached without further ado.
    let _server = Other::start(&[Path::new("serve-export"), &model, &socket]);
    let again = Attachment::open(&Source::Socket(socket), &expected).unwrap();
    assert_ne!(again.epoch(), attachment.epoch());
}

fn watched_exporter() {
    let (dir, model, expected) = model(true);
    let socket = dir.path().join("s");
    let mut server = Other::start(&[Path::new("serve-export"), &model, &socket]);
    let attachment = Attachment::open(&Source::Socket(socket), &expected).unwrap();
    let started = Instant::now();
    attachment.watch(Duration::from_millis(50)).unwrap();
    assert!(started.elapsed() >= Duration::from_millis(50), "nothing has happened that could end the sleep");
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| (attachment.watch(Duration::from_secs(60)), Instant::now()));
        std::thread::sleep(Duration::from_millis(50));
        server.child.kill().unwrap();
        let killed = Instant::now();
        let (seen, at) = watching.join().unwrap();
        assert!(seen.is_err());
        assert!(at - killed < Duration::from_millis(100), "seen after {:?}", at - killed);
    });
}

fn dying_exporter() {
    let (dir, model, expected) = model(true);
    let socket = dir.path().join("s");
    let server = Other::start(&[Path::new("serve-then-die-slowly"), &model, &socket]);
    let attachment = Attachment::open(&Source::Socket(socket), &expected).unwrap();
    let started = Instant::now();
    assert!(attachment.watch(Duration::from_secs(20)).is_err(), "nobody saw that it is dying");
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(Path::new(&format!("/proc/{}", server.child.id())).exists(), "it was to be dying, not dead");
}

fn killed_trainer() {
    let (dir, model, expected) = model(true);
    let socket = dir.path().join("s");
    let weights = Arc::new(SharedWeights::load(&model, &expected, None).unwrap());
    let handle = weights.serve(&socket, Arc::new(())).unwrap();
    let mut trainer = Other::start(&[Path::new("train"), &socket]);
    let refusal = Attachment::open(&Source::Socket(socket.clone()), &expected).unwrap_err().to_string();
    assert!(refusal.contains(&format!("leased by pid {}", trainer.child.id())), "{refusal}");
    trainer.kill();
    let deadline = Instant::now() + Duration::from_secs(5);
    while handle.leased_by().is_some() {
        assert!(Instant::now() < deadline, "the lease was not given back");
        std::thread::sleep(Duration::from_millis(1));
    }
    Attachment::open(&Source::Socket(socket), &expected).unwrap();
}

fn staged_server() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    stage(&model, &live, &mut |_, _| {}).unwrap();
    let attachment = Attachment::open(&Source::Staged(live.clone()), &expected).unwrap();
    assert_eq!((attachment.pid(), attachment.alive()), (None, true));
    let mut server = Other::start(&[Path::new("serve-staged"), &live]);
    let pid = server.child.id();
    assert_eq!(servers_of(&live).unwrap(), [pid]);
    assert_eq!(attachment.refresh_server().unwrap(), Some(pid));
    let mut want = content(NAME, 128);
    assert_eq!(server.ask("read"), hex(&want));
    attachment.find(NAME).unwrap().write(10, &[1, 2, 3, 4]);
    want[10..14].copy_from_slice(&[1, 2, 3, 4]);
    assert_eq!(server.ask("read"), hex(&want));

    server.kill();
    let gone = attachment.check().unwrap_err();
    assert_eq!(gone.pid, Some(pid));
    assert_eq!(attachment.refresh_server().unwrap(), None);
    assert!(!attachment.alive());
    // What was trained is in the live copy: the next server starts with it.
    let mut next = Other::start(&[Path::new("serve-staged"), &live]);
    assert_eq!(attachment.refresh_server().unwrap(), Some(next.child.id()));
    assert!(attachment.alive());
    assert_eq!(next.ask("read"), hex(&want));
}

fn no_staging_under_a_server() {
    let (dir, model, _) = model(true);
    let live = dir.path().join("live");
    stage(&model, &live, &mut |_, _| {}).unwrap();
    let mut server = Other::start(&[Path::new("serve-staged"), &live]);
    let error = stage(&model, &live, &mut |_, _| {}).unwrap_err().to_string();
    assert!(error.contains(&format!("[{}]", server.child.id())), "{error}");
    assert_eq!(server.ask("read"), hex(&content(NAME, 128)));
    server.kill();
    stage(&model, &live, &mut |_, _| {}).unwrap();
}
