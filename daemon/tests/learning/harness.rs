//! The real binary twice: the embedded engine and the daemon attached to it, on a copy of the demo model.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

pub const QUESTION: &str = "Where does Mira the fox live?";
pub const BEFORE: &str = "Mira lives in the green forest.";
pub const TAUGHT: &str = "Mira lives by the blue lake.";

/// A process of ours that says on its first line where it listens; killed when dropped.
pub struct Process {
    pub child: Child,
    pub url: String,
}

impl Process {
    pub fn start(command: &mut Command) -> Process {
        Process::of(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
    }

    /// One that was started with its output piped.
    pub fn of(mut child: Child) -> Process {
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("first line {line:?}: {e}"));
        Process { child, url: format!("http://{}", said["listening"].as_str().unwrap()) }
    }

    pub fn get(&self, path: &str) -> Value {
        ureq::get(format!("{}{path}", self.url)).call().unwrap().body_mut().read_json().unwrap()
    }

    pub fn post(&self, path: &str, body: Value) -> Value {
        ureq::post(format!("{}{path}", self.url)).send_json(body).unwrap().body_mut().read_json().unwrap()
    }

    /// SIGTERM, and a successful end.
    pub fn stop(mut self) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), Signal::TERM).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with a copy of the demo model.
pub struct Place {
    pub dir: tempfile::TempDir,
    gpu: bool,
}

impl Place {
    pub fn new() -> Place {
        Place::with(false)
    }

    /// Where the weights lie in a GPU's memory: the simulated driver's, or with APOLLOD_TEST_DRIVER=real the machine's.
    pub fn on_a_gpu() -> Place {
        Place::with(true)
    }

    fn with(gpu: bool) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../research/demo_model/model");
        std::fs::create_dir(dir.path().join("model")).unwrap();
        for entry in std::fs::read_dir(source).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, dir.path().join("model").join(path.file_name().unwrap())).unwrap();
        }
        Place { dir, gpu }
    }

    pub fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    pub fn engine(&self) -> Process {
        Process::start(&mut self.engine_command())
    }

    pub fn engine_command(&self) -> Command {
        let mut command = self.apollod();
        command.arg("engine").args(["--device", if self.gpu { "cuda" } else { "cpu" }]);
        command.arg(self.model()).arg("--socket").arg(self.dir.path().join("engine.sock"));
        command.args(["--listen", "127.0.0.1:0"]);
        command
    }

    /// The binary.
    pub fn apollod(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_apollod"));
        if self.gpu && !simulated_driver::real() {
            command.env("LD_LIBRARY_PATH", simulated_driver::library_dir());
        }
        command
    }

    /// The daemon's command line: lr as in the demo, syncs only when asked.
    pub fn daemon_command(&self, settings: &[&str]) -> Command {
        self.command(&format!("server.socket={}", self.dir.path().join("engine.sock").display()), settings)
    }

    fn command(&self, server: &str, settings: &[&str]) -> Command {
        let mut command = self.apollod();
        command.arg("serve").env("APOLLOD_LOG", "warn");
        let model = format!("model.dir={}", self.model().display());
        let fixed = [&model, server, "http.listen=127.0.0.1:0", "train.lr=2e-4", "sync.schedule=0 0 1 1 *"];
        fixed.iter().chain(settings).for_each(|s| {
            command.args(["--set", s]);
        });
        command
    }

    pub fn daemon(&self, settings: &[&str]) -> Process {
        Self::ready(&mut self.daemon_command(settings))
    }

    /// A daemon on the live copy in `live`.
    pub fn live_daemon(&self, live: &Path, settings: &[&str]) -> Process {
        Self::ready(&mut self.command(&format!("server.live={}", live.display()), settings))
    }

    /// The command line of a daemon on the live copy in `live`, its output thrown away.
    pub fn live_command(&self, live: &Path) -> Command {
        let mut command = self.command(&format!("server.live={}", live.display()), &[]);
        command.stdout(Stdio::null());
        command
    }

    fn ready(command: &mut Command) -> Process {
        let daemon = Process::start(command);
        until("the daemon is ready", || ureq::get(format!("{}/ready", daemon.url)).call().is_ok());
        daemon
    }

    /// Weights and optimizer state of a generation.
    pub fn files(&self, generation: u64) -> (Vec<u8>, Vec<u8>) {
        let state = self.model().join(format!(".apollod/state/{generation}"));
        (std::fs::read(self.model().join("model.safetensors")).unwrap(), std::fs::read(state).unwrap())
    }
}

pub fn lesson(question: &str, answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
}

/// Posts examples and returns their ids.
pub fn post(daemon: &Process, examples: Vec<Value>) -> Vec<String> {
    let posted = daemon.post("/v1/examples", Value::from(examples));
    posted["accepted"].as_array().unwrap().iter().map(|a| a["id"].as_str().unwrap().into()).collect()
}

pub fn wait_trained(daemon: &Process, ids: &[String]) {
    for id in ids {
        until("an example is trained", || {
            let state = daemon.get(&format!("/v1/examples/{id}"))["state"].clone();
            assert!(["queued", "training", "trained"].iter().any(|s| state == *s), "{state}");
            state == "trained"
        });
    }
}

/// Greedy answer and why it ended.
pub fn ask(engine: &Process, question: &str) -> (String, String) {
    let body = json!({"messages": [{"role": "user", "content": question}], "max_tokens": 40});
    let choice = engine.post("/v1/chat/completions", body)["choices"][0].clone();
    let text = |v: &Value| v.as_str().unwrap().trim().to_owned();
    (text(&choice["message"]["content"]), text(&choice["finish_reason"]))
}

pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waited 60 s until {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
