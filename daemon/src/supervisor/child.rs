//! The trainer child: how it is started, read and ended.
//!
//! It must not outlive the supervisor, which alone knows what it was given: the kernel kills it when the supervisor's
//! thread ends (PR_SET_PDEATHSIG), and its stdin reaches end of file. It has a process group of its own, so that
//! Ctrl-C in a terminal reaches the supervisor only, which then lets the step finish.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child as Process, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::protocol::{self, FromTrainer, ProtocolError, ToTrainer};

/// How to start the trainer.
#[derive(Debug, Clone)]
pub struct ChildCommand {
    /// The program; in production this one.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl ChildCommand {
    /// This program's `trainer` subcommand on a configuration file that says all there is to say.
    ///
    /// # Errors
    /// When the system cannot name the running program.
    pub fn of_this_program(config: &std::path::Path) -> io::Result<Self> {
        let program = std::env::current_exe()?;
        Ok(Self { program, arguments: vec!["trainer".into(), "--config".into(), config.into()] })
    }
}

/// What a child's reader sees.
#[derive(Debug)]
pub enum Output {
    /// A line of the protocol.
    Message(FromTrainer),
    /// A line of something else.
    Nonsense(ProtocolError),
    /// The end: the child is gone or about to go.
    Closed,
}

/// A running trainer.
pub struct Child {
    process: Process,
    stdin: Option<ChildStdin>,
}

impl Child {
    /// Starts a trainer; `output` is called for each line, on a thread of its own. Call this on a thread that lives as
    /// long as the child should: it dies with it.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(
        command: &ChildCommand,
        weight_version: u64,
        output: impl Fn(Output) + Send + 'static,
    ) -> io::Result<Self> {
        let parent = rustix::process::getpid();
        let mut spawning = Command::new(&command.program);
        spawning.args(&command.arguments).arg(format!("--weight-version={weight_version}"));
        spawning.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        for (name, _) in std::env::vars_os() {
            // The file holds what the environment said; a flag may have overruled it, so it must not be read again.
            if name.to_str().is_some_and(crate::config::is_config_variable) {
                spawning.env_remove(name);
            }
        }
        let die_with_parent = move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            // The parent may have died before the line above; the child then has another.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::Error::other("the supervisor died"));
            }
            Ok(())
        };
        // SAFETY: between fork and exec only prctl and getppid run, both async-signal-safe system calls without
        // allocation or locks (pre_exec's contract); the closure captures a plain process id. `io::Error::other`
        // allocates only when the parent is already dead, where a hang in malloc ends with the signal just asked for.
        unsafe { spawning.pre_exec(die_with_parent) };
        let mut process = spawning.spawn()?;
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().expect("stdout was piped");
        std::thread::Builder::new().name("trainer-output".into()).spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok).filter(|line| !line.trim().is_empty()) {
                output(protocol::parse(&line).map_or_else(Output::Nonsense, Output::Message));
            }
            output(Output::Closed);
        })?;
        Ok(Self { process, stdin })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When the child is gone; its reader will say so too.
    pub fn send(&mut self, request: &ToTrainer) -> io::Result<()> {
        match &mut self.stdin {
            Some(stdin) => protocol::send(stdin, request),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Lets it end by itself for at most `patience`, then kills it; says how it ended.
    pub fn end(mut self, patience: Duration) -> String {
        drop(self.stdin.take());
        let deadline = Instant::now() + patience;
        loop {
            match self.process.try_wait() {
                Ok(Some(status)) => return describe(status),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                _ => break,
            }
        }
        // Fails only when it is gone already, which is what is wanted.
        let _ = self.process.kill();
        match self.process.wait() {
            Ok(_) if patience.is_zero() => "killed".into(),
            Ok(_) => format!("killed, as it did not end within {:.0} s", patience.as_secs_f32()),
            Err(error) => format!("cannot be waited for: {error}"),
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}{}", signal_hint(signal)),
        (None, None) => status.to_string(),
    }
}

/// What the usual signals mean here.
fn signal_hint(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (SIGKILL: the system was out of memory, or someone ended it)",
        libc::SIGBUS => " (SIGBUS: a mapped file of weights was cut short)",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGABRT => " (SIGABRT)",
        libc::SIGTERM => " (SIGTERM)",
        _ => "",
    }
}
