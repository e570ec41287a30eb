//! Hostile surroundings of a daemon: others of its kind, and a damaged queue. DESIGN.md has the list; the checkpoint's
//! are in checkpoint/tests/surroundings.rs.

#[path = "support/tiny_model.rs"]
#[allow(dead_code)]
mod tiny_model;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A model directory with a configuration.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        tiny_model::write(dir.path(), tiny_model::CHATML);
        let config = "[model]\ndir = \".\"\n[server]\nlive = \"/nonexistent/live\"\n[http]\nlisten = \"127.0.0.1:0\"\n";
        std::fs::write(dir.path().join("apollod.toml"), config).unwrap();
        Place { dir }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A daemon on it whose trainer trains nothing.
    fn serve(&self) -> Running {
        let trainer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/fake_trainer.sh");
        let mut command = Command::new(env!("CARGO_BIN_EXE_apollod"));
        command.arg("serve").arg("--config").arg(self.file("apollod.toml")).arg("--trainer").arg(trainer);
        command.env("FAKE_TRAINER", self.dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running(command.spawn().unwrap())
    }
}

/// A process that ends with the test.
struct Running(Child);

impl Running {
    /// The address on its first line.
    fn url(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        assert_eq!(said["pid"], self.0.id());
        format!("http://{}", said["listening"].as_str().unwrap())
    }

    /// What it says on stderr until it ends, which must be without success.
    fn refused(mut self) -> String {
        until("it ends", || self.0.try_wait().unwrap().is_some());
        let mut said = String::new();
        self.0.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(self.0.wait().unwrap().code(), Some(1), "{said}");
        said
    }

    fn stop(mut self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited 60 s until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn get(url: &str) -> Value {
    ureq::get(url).call().unwrap().body_mut().read_json().unwrap()
}

#[test]
fn of_fifty_daemons_started_at_once_one_serves_and_the_others_say_which() {
    let place = Place::new();
    let mut daemons: Vec<Running> = (0..50).map(|_| place.serve()).collect();
    let mut refused = Vec::new();
    until("all but one have ended", || {
        while let Some(ended) = daemons.iter_mut().position(|daemon| daemon.0.try_wait().unwrap().is_some()) {
            refused.push(daemons.swap_remove(ended).refused());
        }
        daemons.len() <= 1
    });
    let mut serving = daemons.pop().expect("one serves");
    let holder = format!("another apollod serves this model directory: process {} holds ", serving.0.id());
    for said in &refused {
        assert!(said.contains(&holder), "{said}");
    }
    assert_eq!(refused.len(), 49);
    let url = serving.url();
    assert_eq!(std::fs::read_to_string(place.file(".apollod/address")).unwrap().trim(), url);
    until("it is ready", || ureq::get(format!("{url}/ready")).call().is_ok());
    assert_eq!(std::fs::read_to_string(place.file("log")).unwrap(), "start\n", "one trainer was started");
    serving.stop();
}

/// Posts examples, which wait, and gives their number.
fn post_waiting(url: &str) -> u64 {
    until("it is ready", || ureq::get(format!("{url}/ready")).call().is_ok());
    ureq::post(format!("{url}/v1/pause")).send_json(json!({})).unwrap();
    until("it is paused", || get(&format!("{url}/v1/status"))["state"] == "paused");
    let examples: Vec<Value> =
        (0..300).map(|i| json!({"context": format!("{i} {}", "x".repeat(40)), "decision": "yes"})).collect();
    ureq::post(format!("{url}/v1/examples")).send_json(json!(examples)).unwrap();
    get(&format!("{url}/v1/status"))["queue"]["queued"].as_u64().unwrap()
}

#[test]
fn a_damaged_queue_is_refused_at_the_start_and_loses_nothing() {
    let place = Place::new();
    let mut daemon = place.serve();
    assert_eq!(post_waiting(&daemon.url()), 300);
    daemon.stop();
    let queue = place.file(".apollod/queue.sqlite");
    let good = std::fs::read(&queue).unwrap();
    let overwrite = |offset: u64, bytes: &[u8]| {
        std::fs::write(&queue, &good).unwrap();
        std::fs::File::options().write(true).open(&queue).unwrap().write_all_at(bytes, offset).unwrap();
    };
    let damages: [(&str, &dyn Fn()); 4] = [
        ("damaged (", &|| overwrite(0, &[0x55; 100])),
        ("damaged (", &|| overwrite(4096 * 3, &[0xff; 4096])),
        ("damaged (", &|| std::fs::write(&queue, &good[..good.len() / 2 / 4096 * 4096]).unwrap()),
        ("unable to open database file", &|| {
            std::fs::remove_file(&queue).unwrap();
            std::fs::create_dir(&queue).unwrap();
        }),
    ];
    for (reason, damage) in damages {
        damage();
        let bytes = std::fs::read(&queue).ok();
        let said = place.serve().refused();
        assert!(said.contains(reason) && said.contains("queue.sqlite"), "{said}");
        assert!(std::fs::read(&queue).ok() == bytes, "the queue is not as it was: {said}");
        assert!(!place.file(".apollod/address").exists());
    }
    std::fs::remove_dir(&queue).unwrap();
    std::fs::write(&queue, &good).unwrap();
    let mut daemon = place.serve();
    let url = daemon.url();
    until("everything is trained", || get(&format!("{url}/v1/status"))["queue"]["trained"] == 300);
    daemon.stop();
}
