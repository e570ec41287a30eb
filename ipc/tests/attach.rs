//! Attaching to an exporter: what is shared, and what is refused.

mod common;

use common::{content, model};
use ipc::{
    Allocation, Attachment, Control, ControlError, Engine, Error, Invalidation, Manifest, ManifestError, Server,
    SharedWeights, Source,
};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use weight_map::HfTensor;

/// An exporter in this process, of a model in a directory of its own.
struct Exporter {
    dir: tempfile::TempDir,
    model: PathBuf,
    expected: Vec<HfTensor>,
    weights: Arc<SharedWeights>,
    socket: PathBuf,
}

fn exporter() -> Exporter {
    let (dir, model, expected) = model(true);
    let weights = Arc::new(SharedWeights::load(&model, &expected, None).unwrap());
    let socket = dir.path().join("weights.sock");
    Exporter { dir, model, expected, weights, socket }
}

impl Exporter {
    fn source(&self) -> Source {
        Source::Socket(self.socket.clone())
    }

    fn manifest_file(&self, manifest: &Manifest) -> Source {
        let path = self.dir.path().join("manifest.json");
        std::fs::write(&path, serde_json::to_vec(manifest).unwrap()).unwrap();
        Source::Manifest(path)
    }

    /// Opens a changed manifest by file and returns why it was refused.
    fn refusal(&self, change: impl FnOnce(&mut Manifest)) -> Error {
        let mut manifest = self.weights.manifest().clone();
        change(&mut manifest);
        Attachment::open(&self.manifest_file(&manifest), &self.expected).unwrap_err()
    }

    fn assert_untouched(&self) {
        for index in 0..self.weights.len() {
            let tensor = self.weights.tensor(index);
            assert!(tensor.read() == content(tensor.name, tensor.bytes), "{} was written to", tensor.name);
        }
    }
}

/// Path and bytes of a manifest's one allocation.
fn file_of(manifest: &mut Manifest) -> (&mut PathBuf, &mut u64) {
    match manifest.allocations.as_mut_slice() {
        [Allocation::File { path, bytes, .. }] => (path, bytes),
        other => panic!("not one file: {other:?}"),
    }
}

/// An exporter that says `answer` and nothing else.
fn impostor(socket: &Path, answer: Vec<u8>) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        assert_eq!(line, "{\"hello\":1}\n");
        (&stream).write_all(&answer).unwrap();
    })
}

#[test]
fn loaded_weights_are_those_of_the_files_and_aligned() {
    let exporter = exporter();
    exporter.assert_untouched();
    for view in &exporter.weights.map().views {
        assert_eq!(view.offset % 64, 0, "{}", view.name);
    }
}

#[test]
fn a_write_through_the_attachment_is_seen_by_the_exporter_and_the_other_way_round() {
    let exporter = exporter();
    let _handle = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap();
    let attachment = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    attachment.find(name).unwrap().write(4, &[1, 2, 3, 4]);
    let seen = exporter.weights.find(name).unwrap();
    assert_eq!(seen.read()[4..8], [1, 2, 3, 4]);
    seen.write(0, &[9, 9]);
    assert_eq!(attachment.find(name).unwrap().read()[..6], [9, 9, content(name, 4)[2], content(name, 4)[3], 1, 2]);
    assert_eq!(attachment.epoch(), exporter.weights.epoch());
    assert_eq!(attachment.pid(), Some(std::process::id()));
    assert_eq!(attachment.model_dir(), exporter.model.canonicalize().unwrap());
    attachment.ping(Duration::from_secs(5)).unwrap();
}

#[test]
fn a_second_trainer_is_told_who_has_the_lease_and_gets_it_afterwards() {
    let exporter = exporter();
    let handle = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap();
    let first = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    assert_eq!(handle.leased_by(), Some(std::process::id()));
    let error = Attachment::open(&exporter.source(), &exporter.expected).unwrap_err();
    assert!(
        matches!(&error, Error::Leased { pid: Some(pid), path } if *pid == std::process::id() && *path == exporter.socket),
        "{error}"
    );
    drop(first);
    until(|| handle.leased_by().is_none());
    Attachment::open(&exporter.source(), &exporter.expected).unwrap();
}

#[test]
fn a_wrong_shape_or_a_missing_tensor_is_named_and_nothing_is_written() {
    let exporter = exporter();
    let _handle = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap();
    let mut wrong = exporter.expected.clone();
    wrong[3].shape[0] += 2;
    let error = Attachment::open(&exporter.source(), &wrong).unwrap_err().to_string();
    assert!(error.contains(&format!("`{}`", wrong[3].name)), "{error}");
    let mut more = exporter.expected.clone();
    more.push(HfTensor { name: "model.layers.2.mlp.up_proj.weight".into(), ..more[4].clone() });
    let error = loop {
        // The lease of the connection above is given back when its end has been read.
        match Attachment::open(&exporter.source(), &more).unwrap_err() {
            Error::Refused { .. } => std::thread::sleep(Duration::from_millis(1)),
            error => break error.to_string(),
        }
    };
    assert!(error.contains("model.layers.2.mlp.up_proj.weight"), "{error}");
    exporter.assert_untouched();
}

#[test]
fn an_exporter_that_stops_is_noticed_at_once() {
    let exporter = exporter();
    let handle = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap();
    let attachment = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    attachment.check().unwrap();
    drop(handle);
    let gone = attachment.check().unwrap_err();
    assert_eq!(gone.pid, Some(std::process::id()));
    assert!(!attachment.alive());
    assert!(attachment.ping(Duration::from_secs(1)).is_err());
    assert!(!exporter.socket.exists(), "the socket was left behind");
}

#[test]
fn a_manifest_in_a_file_is_leased_by_a_lock_beside_it() {
    let exporter = exporter();
    let source = exporter.manifest_file(exporter.weights.manifest());
    let first = Attachment::open(&source, &exporter.expected).unwrap();
    first.tensor(0).write(0, &[7, 7]);
    assert_eq!(exporter.weights.tensor(0).read()[..2], [7, 7]);
    let error = Attachment::open(&source, &exporter.expected).unwrap_err();
    assert!(matches!(error, Error::Leased { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
    drop(first);
    Attachment::open(&source, &exporter.expected).unwrap();
}

#[test]
fn a_manifest_that_outlived_its_server_is_refused() {
    let exporter = exporter();
    let error = exporter.refusal(|manifest| manifest.pid = 4_194_305);
    assert!(matches!(&error, Error::Gone(gone) if gone.pid == Some(4_194_305)), "{error}");
    // A living process that holds no such memory: its id was used again.
    let mut stranger = std::process::Command::new("sleep").arg("60").spawn().unwrap();
    let error = exporter.refusal(|manifest| manifest.pid = stranger.id());
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert!(matches!(error, Error::Stale { pid, .. } if pid == stranger.id()), "{error}");
}

#[test]
fn memory_that_is_too_short_twice_listed_or_the_model_itself_is_refused() {
    let exporter = exporter();
    let error = exporter.refusal(|manifest| {
        *file_of(manifest).1 += 1;
    });
    assert!(error.to_string().contains("but the server describes"), "{error}");
    let error = exporter.refusal(|manifest| {
        let path = file_of(manifest).0.to_str().unwrap().replace("/fd/", "/task/../fd/").into();
        let copy = Allocation::File { path, bytes: 64, writable_by: Default::default() };
        manifest.allocations.push(copy);
    });
    assert!(error.to_string().contains("under two paths"), "{error}");

    let file = exporter.model.join("model.safetensors");
    let opened = std::fs::File::open(&file).unwrap();
    let bytes_of_file = opened.metadata().unwrap().len();
    let error = exporter.refusal(|manifest| {
        let copy = Allocation::File { path: file.clone(), bytes: bytes_of_file, writable_by: Default::default() };
        manifest.allocations.push(copy);
    });
    assert!(error.to_string().contains("which only a sync may write"), "{error}");
    exporter.assert_untouched();
}

#[test]
fn a_peer_that_is_not_the_process_in_the_manifest_is_refused() {
    let exporter = exporter();
    let mut manifest = exporter.weights.manifest().clone();
    manifest.pid = 1;
    let mut answer = serde_json::to_vec(&manifest).unwrap();
    answer.push(b'\n');
    let thread = impostor(&exporter.socket, answer);
    let error = Attachment::open(&exporter.source(), &exporter.expected).unwrap_err();
    thread.join().unwrap();
    assert!(matches!(error, Error::PeerPid { manifest: 1, .. }), "{error}");
}

#[test]
fn an_exporter_that_babbles_is_refused() {
    for (answer, want) in [("", "without an answer"), ("{\"version\":1", "cannot talk to"), ("[]\n", "not a manifest")]
    {
        let exporter = exporter();
        let thread = impostor(&exporter.socket, answer.into());
        let error = Attachment::open(&exporter.source(), &exporter.expected).unwrap_err().to_string();
        thread.join().unwrap();
        assert!(error.contains(want), "{answer:?}: {error}");
    }
}

#[test]
fn a_file_that_the_exporter_does_not_hold_is_refused() {
    let exporter = exporter();
    let mut manifest = exporter.weights.manifest().clone();
    let (path, bytes) = file_of(&mut manifest);
    let backup = exporter.dir.path().join("backup");
    let before = vec![7; *bytes as usize];
    std::fs::write(&backup, &before).unwrap();
    *path = backup.clone();
    let mut answer = serde_json::to_vec(&manifest).unwrap();
    answer.push(b'\n');
    let thread = impostor(&exporter.socket, answer);
    let error = Attachment::open(&exporter.source(), &exporter.expected).unwrap_err();
    thread.join().unwrap();
    assert!(matches!(&error, Error::Stale { path, .. } if *path == backup), "{error}");
    assert_eq!(std::fs::read(&backup).unwrap(), before);
}

#[test]
fn an_answer_that_trickles_in_is_given_up_in_time() {
    let exporter = exporter();
    let mut manifest = serde_json::to_vec(exporter.weights.manifest()).unwrap();
    manifest.push(b'\n');
    let listener = UnixListener::bind(&exporter.socket).unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        (&stream).write_all(&manifest).unwrap();
        // Ends when the other side has gone.
        while (&stream).write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let attachment = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    let clock = Instant::now();
    let error = attachment.ping(Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, ControlError::TimedOut { .. }), "{error}");
    assert!(clock.elapsed() < Duration::from_secs(5), "{:?}", clock.elapsed());
    drop(attachment);
    thread.join().unwrap();
}

#[test]
fn a_client_that_babbles_is_told_and_takes_no_lease() {
    let exporter = exporter();
    let handle = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap();
    for request in ["{\"hello\":2}\n", "{\"ping\":1}\n", "nonsense\n"] {
        let stream = std::os::unix::net::UnixStream::connect(&exporter.socket).unwrap();
        (&stream).write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer).unwrap();
        assert!(answer.starts_with("{\"error\":"), "{request}: {answer}");
    }
    assert_eq!(handle.leased_by(), None);
}

#[test]
fn the_socket_is_private_and_only_a_dead_one_is_replaced() {
    let exporter = exporter();
    drop(UnixListener::bind(&exporter.socket).unwrap());
    let _handle = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap();
    let mode = std::fs::metadata(&exporter.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let error = exporter.weights.serve(&exporter.socket, Arc::new(())).unwrap_err();
    assert!(error.to_string().contains("living exporter"), "{error}");
    let file = exporter.dir.path().join("notes.txt");
    std::fs::write(&file, "mine").unwrap();
    let error = exporter.weights.serve(&file, Arc::new(())).unwrap_err();
    assert!(error.to_string().contains("something else than a socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    let long = exporter.dir.path().join("x".repeat(120));
    assert!(exporter.weights.serve(&long, Arc::new(())).unwrap_err().to_string().contains("107 bytes"));
}

#[test]
fn exported_memory_cannot_be_truncated_under_a_reader() {
    let exporter = exporter();
    let mut manifest = exporter.weights.manifest().clone();
    let file = std::fs::OpenOptions::new().write(true).open(file_of(&mut manifest).0).unwrap();
    assert!(file.set_len(0).is_err());
}

#[test]
#[should_panic(expected = "leaves `model.norm.weight`")]
fn a_write_beyond_a_tensor_panics() {
    exporter().weights.find("model.norm.weight").unwrap().write(14, &[0; 4]);
}

#[test]
fn memory_of_a_gpu_is_described_as_the_plugin_does_and_checked() {
    const UUID: &str = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f";
    let exporter = exporter();
    let bytes = exporter.weights.manifest().allocations[0].bytes();
    let with = |allocations: serde_json::Value| {
        let mut value = serde_json::to_value(exporter.weights.manifest()).unwrap();
        value["allocations"] = allocations;
        Manifest::parse(value.to_string().as_bytes())
    };
    let cuda = |handle: &str, bytes: u64, device: &str| serde_json::json!({"kind": "cuda_ipc", "handle": handle, "bytes": bytes, "device": device});
    let handle = "0a".repeat(64);
    let manifest = with(serde_json::json!([cuda(&handle, bytes, UUID)])).unwrap();
    assert_eq!(
        manifest.allocations,
        [Allocation::CudaIpc { handle: handle.clone(), bytes, device: UUID.into() }],
        "and it is written as it was read: {}",
        serde_json::to_string(&manifest.allocations).unwrap()
    );
    let refused = |allocations: serde_json::Value| with(allocations).unwrap_err();
    for (allocation, wrong) in [
        (cuda("0a", bytes, UUID), "allocations.handle"),
        (cuda(&"0g".repeat(64), bytes, UUID), "allocations.handle"),
        (cuda(&handle, bytes, "0"), "allocations.device"),
        (cuda(&handle, 0, UUID), "allocations.bytes"),
    ] {
        let error = refused(serde_json::json!([allocation]));
        assert!(matches!(error, ManifestError::Field { field, .. } if field == wrong), "{error}");
    }
    let error = refused(serde_json::json!([cuda(&handle, bytes - 256, UUID)]));
    assert!(matches!(error, ManifestError::Range { .. }), "{error}");
    let twice = refused(serde_json::json!([cuda(&handle, bytes, UUID), cuda(&handle.to_uppercase(), bytes, UUID)]));
    assert!(matches!(twice, ManifestError::Duplicate { .. }), "{twice}");
    let other = cuda(&"0b".repeat(64), bytes, &UUID.replace("0f", "10"));
    let two = refused(serde_json::json!([cuda(&handle, bytes, UUID), other])).to_string();
    assert!(two.contains(UUID) && two.contains("0a0b0c0d0e10") && two.contains("device_map"), "{two}");
    let file = serde_json::to_value(&exporter.weights.manifest().allocations[0]).unwrap();
    let mixed = refused(serde_json::json!([file, cuda(&handle, bytes, UUID)])).to_string();
    assert!(mixed.contains("the machine's memory") && mixed.contains("without offloading"), "{mixed}");
}

#[test]
fn memory_of_a_gpu_in_this_very_process_is_refused() {
    let exporter = exporter();
    let error = exporter.refusal(|manifest| {
        manifest.allocations[0] = Allocation::CudaIpc {
            handle: "0a".repeat(64),
            bytes: manifest.allocations[0].bytes(),
            device: "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f".into(),
        };
    });
    assert!(matches!(error, Error::OwnMemory { pid } if pid == std::process::id()), "{error}");
}

#[test]
fn a_manifest_of_another_version_kind_or_rank_is_refused_for_that() {
    let exporter = exporter();
    let refusal = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = serde_json::to_value(exporter.weights.manifest()).unwrap();
        change(&mut value);
        Manifest::parse(value.to_string().as_bytes()).unwrap_err()
    };
    assert_eq!(refusal(&|m| m["version"] = 2.into()), ManifestError::Version("2".into()));
    let kind = refusal(&|m| m["allocations"][0] = serde_json::json!({"kind": "cuda_fabric", "handle": "00"}));
    assert_eq!(kind, ManifestError::Kind { index: 0, kind: "cuda_fabric".into() });
    assert_eq!(refusal(&|m| m["world_size"] = 2.into()), ManifestError::World { rank: 0, world_size: 2 });
    assert!(matches!(refusal(&|m| m["epoch"] = "abc".into()), ManifestError::Field { field: "epoch", .. }));
    assert!(matches!(refusal(&|m| m["tensors"][2]["offset"] = 1.into()), ManifestError::Misaligned { .. }));
    assert!(matches!(refusal(&|m| m["tensors"][2]["offset"] = u64::MAX.into()), ManifestError::Range { .. }));
    assert!(matches!(refusal(&|m| m["tensors"][2]["allocation"] = 1.into()), ManifestError::Range { bytes: None, .. }));
    assert!(matches!(refusal(&|m| m["tensors"][1] = m["tensors"][2].clone()), ManifestError::Duplicate { .. }));
    assert!(matches!(refusal(&|m| m["tensors"][1]["dtype"] = "torch.int8".into()), ManifestError::Dtype { .. }));
    assert!(matches!(refusal(&|m| m["tensors"][1]["strides"] = serde_json::json!([1])), ManifestError::Strides { .. }));
    assert!(matches!(refusal(&|m| m["allocations"][0]["path"] = "x".into()), ManifestError::Field { .. }));
}

/// An engine that does what it is asked for, or says that it does.
#[derive(Default)]
struct Obliging {
    held: AtomicBool,
    busy: AtomicBool,
}

impl Engine for Obliging {
    fn server(&self) -> Option<Server> {
        Some(Server { name: "obliging".into(), version: "3".into() })
    }
    fn controls(&self) -> Vec<Control> {
        vec![Control::Invalidate, Control::Hold, Control::Score]
    }
    fn invalidate(&self, how: Invalidation) -> Result<Invalidation, String> {
        match how {
            Invalidation::Reset => Ok(Invalidation::Salt),
            Invalidation::Salt => Err("out of salt".into()),
        }
    }
    fn hold(&self, _: Duration) -> bool {
        let free = !self.busy.load(Relaxed);
        self.held.store(free, Relaxed);
        free
    }
    fn release(&self) -> bool {
        self.held.swap(false, Relaxed)
    }
    fn score(&self, ids: &[u32]) -> Result<Vec<f32>, String> {
        if ids.len() > 3 {
            return Ok(vec![0.5]);
        }
        Ok(ids[1..].iter().map(|id| -(*id as f32)).collect())
    }
}

#[test]
fn an_engine_is_asked_over_the_connection() {
    let exporter = exporter();
    let engine = Arc::new(Obliging::default());
    let handle = exporter.weights.serve(&exporter.socket, engine.clone()).unwrap();
    let attachment = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    assert_eq!(attachment.server_program().unwrap().to_string(), "obliging 3");
    assert_eq!(attachment.controls(), engine.controls());

    assert_eq!(attachment.invalidate(Invalidation::Reset), Ok(Invalidation::Salt), "what was done, not what was asked");
    let error = attachment.invalidate(Invalidation::Salt).unwrap_err();
    assert!(matches!(&error, ControlError::Refused { reason, .. } if reason == "out of salt"), "{error}");

    assert_eq!(attachment.score(&[5, 17, 3]).unwrap(), [-17.0, -3.0]);
    assert!(matches!(attachment.score(&[1, 2, 3, 4]), Err(ControlError::Babble { .. })));

    let hold = attachment.hold(Duration::from_secs(5)).unwrap();
    assert!(engine.held.load(Relaxed));
    assert_eq!(hold.release(), Ok(true));
    assert!(!engine.held.load(Relaxed));
    drop(attachment.hold(Duration::from_secs(5)).unwrap());
    assert!(!engine.held.load(Relaxed), "released when dropped");
    let hold = attachment.hold(Duration::from_secs(5)).unwrap();
    engine.held.store(false, Relaxed);
    assert_eq!(hold.release(), Ok(false), "its time had passed");
    engine.busy.store(true, Relaxed);
    assert!(matches!(attachment.hold(Duration::from_millis(10)), Err(ControlError::Busy { .. })));

    engine.busy.store(false, Relaxed);
    std::mem::forget(attachment.hold(Duration::from_secs(5)).unwrap());
    drop(attachment);
    until(|| handle.leased_by().is_none());
    assert!(!engine.held.load(Relaxed), "a hold ends with the connection");
}

/// An engine whose score is a mistake of its own.
struct Broken;

impl Engine for Broken {
    fn controls(&self) -> Vec<Control> {
        vec![Control::Score]
    }
    fn score(&self, _: &[u32]) -> Result<Vec<f32>, String> {
        panic!("the GPU is gone")
    }
}

#[test]
fn an_engine_that_panics_ends_the_connection_and_the_lease() {
    let exporter = exporter();
    let handle = exporter.weights.serve(&exporter.socket, Arc::new(Broken)).unwrap();
    let attachment = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    assert!(handle.leased_by().is_some());
    assert!(matches!(attachment.score(&[1, 2]), Err(ControlError::Gone(_))));
    until(|| handle.leased_by().is_none());
    assert!(attachment.check().is_err(), "the trainer is told");
    Attachment::open(&exporter.source(), &exporter.expected).expect("the next one gets the lease");
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let exporter = exporter();
    let listener = UnixListener::bind(&exporter.socket).unwrap();
    let manifest = serde_json::to_string(exporter.weights.manifest()).unwrap();
    let epoch = exporter.weights.epoch().to_owned();
    let (go_on, wait) = std::sync::mpsc::channel();
    let slow = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(&stream).lines();
        lines.next();
        writeln!(&stream, "{manifest}").unwrap();
        let number = |line: String| serde_json::from_str::<serde_json::Value>(&line).unwrap()["ping"].clone();
        let late = format!("{{\"pong\":{},\"epoch\":\"{epoch}\"}}\n", number(lines.next().unwrap().unwrap()));
        let (begins, ends) = late.split_at(7);
        (&stream).write_all(begins.as_bytes()).unwrap();
        wait.recv().unwrap();
        (&stream).write_all(ends.as_bytes()).unwrap();
        let next = number(lines.next().unwrap().unwrap());
        writeln!(&stream, "{{\"pong\":{next},\"epoch\":\"{epoch}\"}}").unwrap();
        let last = number(lines.next().unwrap().unwrap());
        writeln!(&stream, "{{\"pong\":{last},\"epoch\":\"another\"}}").unwrap();
    });
    let attachment = Attachment::open(&exporter.source(), &exporter.expected).unwrap();
    assert!(matches!(attachment.hold(Duration::ZERO), Err(ControlError::NotOffered { request: "hold" })));
    let error = attachment.ping(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, ControlError::TimedOut { request: "ping", .. }), "{error}");
    go_on.send(()).unwrap();
    attachment.ping(Duration::from_secs(5)).unwrap();
    let error = attachment.ping(Duration::from_secs(5)).unwrap_err().to_string();
    assert!(error.contains("it now holds epoch another"), "{error}");
    slow.join().unwrap();
}

fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !holds() {
        assert!(Instant::now() < deadline, "waited 5 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}
