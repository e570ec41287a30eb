//! Tests that need processes of their own: the test program starts itself again with a role.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

/// Runs the tests whose names contain a word of the command line, or all of them.
pub fn run_tests(arguments: &[&str], tests: &[(&str, fn())]) -> ExitCode {
    if arguments.contains(&"--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let words: Vec<&&str> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let mut failed = 0;
    for (name, test) in
        tests.iter().filter(|(name, _)| words.is_empty() || words.iter().any(|word| name.contains(**word)))
    {
        let passed = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += u32::from(!passed);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Another process of this program, killed when dropped.
pub struct Other {
    pub child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Other {
    /// Starts it and waits until it says that it is ready.
    pub fn start(arguments: &[&Path]) -> Other {
        let (other, first) = Other::start_with(arguments, &[]);
        assert_eq!(first, "ready");
        other
    }

    /// Starts it with more in its environment; what it says first.
    pub fn start_with(arguments: &[&Path], environment: &[(&str, &str)]) -> (Other, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(arguments).envs(environment.iter().copied());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut other = Other { child, input, output };
        let first = other.line();
        (other, first)
    }

    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn ask(&mut self, question: &str) -> String {
        writeln!(self.input, "{question}").unwrap();
        self.line()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may have been killed by the test already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says that it is ready, then answers each line until there are no more.
pub fn answer(mut reply: impl FnMut(&str) -> String) {
    println!("ready");
    for line in std::io::stdin().lines() {
        println!("{}", reply(&line.unwrap()));
    }
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
