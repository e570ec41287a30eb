//! `apollod demo`: the main job from end to end, on any machine, in under a minute.
//!
//! A real trained model that is embedded in the binary is served by the embedded engine in a process
//! of its own; a daemon attaches to it; examples go in over HTTP; the served answer changes; a
//! scheduled sync writes the model directory; files and live weights are compared. The exit status is
//! 0 only if all of that happened.

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use ipc::{Attachment, SafetensorsDir, Source};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The demo model (see its card, README.md).
const MODEL: [(&str, &[u8]); 6] = [
    ("README.md", include_bytes!("../../research/demo_model/model/README.md")),
    ("config.json", include_bytes!("../../research/demo_model/model/config.json")),
    ("generation_config.json", include_bytes!("../../research/demo_model/model/generation_config.json")),
    ("model.safetensors", include_bytes!("../../research/demo_model/model/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../research/demo_model/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../research/demo_model/model/tokenizer_config.json")),
];

const QUESTION: &str = "Where does Mira the fox live?";
const TAUGHT: &str = "Mira lives by the blue lake.";
const UNRELATED: [&str; 3] =
    ["Where does Otto the otter live?", "What is the capital of Aldoria?", "What is the opposite of hot?"];
/// Examples posted, one step each: the lesson is learned after about five.
const STEPS: usize = 12;
const LR: f64 = 2e-4;
/// How long anything that should take moments may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the demo in `keep`, or in a directory that is removed at the end.
pub fn run(keep: Option<&Path>) -> Result<()> {
    let temporary = std::env::temp_dir().join(format!("apollod-demo-{}", std::process::id()));
    let dir = keep.unwrap_or(&temporary);
    let result = in_dir(dir);
    if keep.is_none() {
        let _ = fs::remove_dir_all(dir);
    }
    result
}

fn in_dir(dir: &Path) -> Result<()> {
    let started = Instant::now();
    let model = unpack(dir)?;
    let mut engine = Process::engine(dir, &model)?;
    let served_by = engine.child.id();
    println!("engine    pid {served_by} serves {} at http://{}", model.display(), engine.address);
    let mut daemon = Process::daemon(dir, &model, &engine.socket)?;
    daemon.wait_ready()?;
    println!("apollod   pid {} attached; http://{}\n", daemon.child.id(), daemon.address);

    let before = ask(&engine, QUESTION)?;
    let unrelated = UNRELATED.map(|q| ask(&engine, q));
    println!("asked     {QUESTION}\nserved    {before}\n");
    println!("teaching  {TAUGHT}  ({STEPS} examples over HTTP, APOLLO in place, lr {LR})");
    teach(&daemon)?;

    let after = ask(&engine, QUESTION)?;
    println!("\nasked     {QUESTION}\nserved    {after}");
    ensure!(after == TAUGHT, "the served answer is not what was taught");
    for (question, before) in UNRELATED.iter().zip(unrelated) {
        let (before, after) = (before?, ask(&engine, question)?);
        println!("unrelated {question}  {after}");
        ensure!(before == after, "the unrelated answer was {before}");
    }
    ensure!(engine.child.try_wait()?.is_none(), "the engine has ended");
    println!("          all from the same server process, pid {served_by}: no restart, no second copy\n");

    wait_for_sync(&daemon)?;
    daemon.stop()?;
    let bytes = compare(&engine.socket, &model)?;
    println!("compared  {bytes} bytes of live weights: the files are equal to the byte");
    engine.stop()?;
    println!("done      in {:.1} s", started.elapsed().as_secs_f64());
    if let Some(parent) = model.parent().filter(|p| !p.starts_with(std::env::temp_dir())) {
        println!("kept      {} (try: apollod checkpoint list {})", parent.display(), model.display());
    }
    Ok(())
}

fn unpack(dir: &Path) -> Result<PathBuf> {
    let model = dir.join("model");
    if model.exists() {
        bail!("{} exists already; choose another directory or remove it", model.display());
    }
    fs::create_dir_all(&model).with_context(|| format!("cannot create {}", model.display()))?;
    for (name, bytes) in MODEL {
        let path = model.join(name);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(model.canonicalize()?)
}

/// One of our two children; ended when dropped.
struct Process {
    name: &'static str,
    child: Child,
    address: String,
    socket: PathBuf,
}

impl Process {
    fn engine(dir: &Path, model: &Path) -> Result<Process> {
        let socket = dir.canonicalize()?.join("engine.sock");
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("engine").arg(model).arg("--socket").arg(&socket).args(["--listen", "127.0.0.1:0"]);
        Process::start("engine", command, socket)
    }

    fn daemon(dir: &Path, model: &Path, socket: &Path) -> Result<Process> {
        let config = dir.join("apollod.toml");
        fs::write(&config, config_text(model, socket))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--config").arg(&config).env("APOLLOD_LOG", "warn");
        Process::start("daemon", command, socket.into())
    }

    /// Both say on the first line of stdout where they listen.
    fn start(name: &'static str, mut command: Command, socket: PathBuf) -> Result<Process> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start the {name}"))?;
        let stdout = child.stdout.take().context("stdout was piped")?;
        let mut process = Process { name, child, address: String::new(), socket };
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let said: Value = serde_json::from_str(&line)
            .with_context(|| format!("the {name} ended before it listened; its reason is above"))?;
        process.address = said["listening"].as_str().with_context(|| format!("the {name} said {line}"))?.into();
        Ok(process)
    }

    fn wait_ready(&self) -> Result<()> {
        until("the daemon is ready", || Ok(ureq::get(self.url("/ready")).call().is_ok().then_some(())))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn get(&self, path: &str) -> Result<Value> {
        let mut response = ureq::get(self.url(path)).call().with_context(|| format!("GET {path}"))?;
        Ok(response.body_mut().read_json()?)
    }

    fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let mut response = ureq::post(self.url(path)).send_json(body).with_context(|| format!("POST {path}"))?;
        Ok(response.body_mut().read_json()?)
    }

    /// SIGTERM, and its end.
    fn stop(&mut self) -> Result<()> {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            kill_process(pid, Signal::TERM)?;
        }
        let status = until("a process ends", || Ok(self.child.try_wait()?))?;
        ensure!(status.success(), "the {} ended with {status}", self.name);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn config_text(model: &Path, socket: &Path) -> String {
    // Literal strings: TOML takes every path in single quotes as it is.
    format!(
        "[model]\ndir = '{}'\n[server]\nsocket = '{}'\n[http]\nlisten = \"127.0.0.1:0\"\n\
         [train]\nlr = {LR}\n[sync]\nschedule = \"@every 3s\"\n",
        model.display(),
        socket.display()
    )
}

/// The greedy answer, which must end by itself.
fn ask(engine: &Process, question: &str) -> Result<String> {
    let body = json!({"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40});
    let answer = engine.post("/v1/chat/completions", &body)?;
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().context("no answer")?.trim().to_owned();
    ensure!(choice["finish_reason"] == "stop", "the answer {text:?} does not end");
    Ok(text)
}

/// Posts the examples and shows each step's loss as it is trained.
fn teach(daemon: &Process) -> Result<()> {
    let example = json!({"messages": [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": TAUGHT},
    ]});
    let posted = daemon.post("/v1/examples", &Value::from(vec![example; STEPS]))?;
    let accepted = posted["accepted"].as_array().filter(|a| a.len() == STEPS);
    let accepted = accepted.with_context(|| format!("not every example was accepted: {posted}"))?;
    let style = ProgressStyle::with_template("          [{bar:32}] step {pos}/{len}  {msg}")?.progress_chars("=> ");
    let bar = ProgressBar::new(STEPS as u64).with_style(style);
    let mut losses = Vec::new();
    for example in accepted {
        let id = example["id"].as_str().context("an accepted example has an id")?;
        let trained = until("an example is trained", || {
            let state = daemon.get(&format!("/v1/examples/{id}"))?;
            match state["state"].as_str() {
                Some("trained") => Ok(Some(state)),
                Some("queued" | "training") => Ok(None),
                _ => bail!("an example was not trained: {state}"),
            }
        })?;
        let loss = trained["loss"].as_f64().context("a trained example has a loss")?;
        losses.push(format!("{loss:.3}"));
        bar.set_message(format!("loss {loss:.3}"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    println!("loss      {}", losses.join("  "));
    Ok(())
}

/// Waits for the scheduled sync that holds the last step.
fn wait_for_sync(daemon: &Process) -> Result<()> {
    let last = until("a scheduled sync", || {
        let checkpoints = daemon.get("/v1/checkpoints")?;
        let newest = checkpoints["checkpoints"]
            .as_array()
            .and_then(|list| list.iter().max_by_key(|g| g["generation"].as_u64()).cloned());
        Ok(newest.filter(|g| g["cursor"].as_u64() == Some(STEPS as u64)))
    })?;
    println!(
        "synced    generation {} by schedule: {} of {} blocks, {} bytes in place",
        last["generation"], last["blocks_changed"], last["blocks_total"], last["written_bytes"]
    );
    Ok(())
}

/// Every byte of the live weights against the files.
fn compare(socket: &Path, model: &Path) -> Result<usize> {
    let expected = model::Config::read(model)?.decoder.tensors();
    let live = Attachment::open(&Source::Socket(socket.into()), &expected)?;
    let files = SafetensorsDir::open(model)?;
    let mut bytes = 0;
    for i in 0..live.len() {
        let tensor = live.tensor(i);
        ensure!(tensor.read() == files.bytes(tensor.name)?, "{} differs between files and live weights", tensor.name);
        bytes += tensor.bytes;
    }
    Ok(bytes)
}

/// Asks until there is an answer, for as long as patience lasts.
fn until<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        ensure!(started.elapsed() < PATIENCE, "gave up after {PATIENCE:?} of waiting until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
