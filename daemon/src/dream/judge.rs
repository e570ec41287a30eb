//! Whether an answer becomes an example.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use regex::Regex;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use super::chat::{Answer, Chat};
use crate::config::Judge;

/// How long a judging program may take.
const COMMAND_PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const COMMAND_POLL: Duration = Duration::from_millis(5);

/// A [`Judge`] that can judge.
#[derive(Debug)]
pub struct Judges {
    matches: Option<Regex>,
    rejects: Option<Regex>,
    chars: (usize, usize),
    schema: Option<jsonschema::Validator>,
    command: Option<Vec<String>>,
    rubric: Option<String>,
    /// By how much the instruction must make the answer more likely, in nats a token.
    pub min_divergence: Option<f64>,
}

/// What is judged.
pub struct Case<'a> {
    /// The conversation without the instruction.
    pub messages: &'a [Value],
    /// The instruction.
    pub instruction: &'a str,
    /// What the model said to both.
    pub answer: &'a str,
}

/// Why an answer is not accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The judge, by its key.
    pub by: &'static str,
    /// In words.
    pub reason: String,
}

fn reject(by: &'static str, reason: impl Into<String>) -> Verdict {
    Err(Rejection { by, reason: reason.into() })
}

/// `Err` says why not.
pub type Verdict = Result<(), Rejection>;

impl Judges {
    /// Makes them ready.
    ///
    /// # Errors
    /// Which of them cannot judge, and why.
    pub fn new(judge: &Judge) -> Result<Self> {
        let regex = |name: &str, pattern: &Option<String>| {
            let compile =
                |pattern: &String| Regex::new(pattern).with_context(|| format!("{name}: no regular expression"));
            pattern.as_ref().map(compile).transpose()
        };
        let schema = judge.json_schema.as_ref().map(jsonschema::validator_for).transpose();
        let (min, max) = (judge.min_chars.unwrap_or(0), judge.max_chars.unwrap_or(usize::MAX));
        ensure!(min <= max, "min_chars: is {min}, above max_chars, which is {max}");
        ensure!(judge.command.as_ref().is_none_or(|command| !command.is_empty()), "command: is empty: name a program");
        let empty = judge.rubric.as_ref().is_some_and(|rubric| rubric.trim().is_empty());
        ensure!(!empty, "rubric: is empty: say in words what a good answer is like, or leave it out");
        ensure!(judge.min_divergence.is_none_or(f64::is_finite), "min_divergence: is no number");
        Ok(Self {
            matches: regex("matches", &judge.matches)?,
            rejects: regex("rejects", &judge.rejects)?,
            chars: (min, max),
            schema: schema.map_err(|error| anyhow!("json_schema: no JSON schema: {error}"))?,
            command: judge.command.clone(),
            rubric: judge.rubric.clone(),
            min_divergence: judge.min_divergence,
        })
    }

    /// Whether any of them judges by the answer alone, so that the same can be asked of one that was given without the
    /// instruction.
    pub fn judge_text(&self) -> bool {
        let bounded = self.chars != (0, usize::MAX);
        let others = self.schema.is_some() || self.command.is_some() || self.rubric.is_some();
        self.matches.is_some() || self.rejects.is_some() || bounded || others
    }

    /// All but the divergence, the cheap ones first.
    ///
    /// # Errors
    /// A program cannot be run; the model does not answer.
    pub fn judge(&self, chat: &Chat, case: &Case<'_>, answer: &Answer) -> Result<Verdict> {
        if let Err(rejection) = self.by_text(answer) {
            return Ok(Err(rejection));
        }
        if let Some(command) = &self.command
            && let Err(rejection) = by_command(command, case)?
        {
            return Ok(Err(rejection));
        }
        self.rubric.as_ref().map_or(Ok(Ok(())), |rubric| by_rubric(chat, rubric, case))
    }

    fn by_text(&self, answer: &Answer) -> Verdict {
        let text = answer.text.as_str();
        let (min, max) = self.chars;
        let chars = text.chars().count();
        if !answer.ended {
            return reject("max_tokens", "it did not end within dream.max_tokens");
        }
        if chars < min.max(1) {
            return reject("min_chars", format!("{chars} characters, fewer than {}", min.max(1)));
        }
        if chars > max {
            return reject("max_chars", format!("{chars} characters, more than {max}"));
        }
        if let Some(regex) = self.matches.as_ref().filter(|regex| !regex.is_match(text)) {
            return reject("matches", format!("{regex} does not match"));
        }
        if let Some(regex) = self.rejects.as_ref().filter(|regex| regex.is_match(text)) {
            return reject("rejects", format!("{regex} matches"));
        }
        let Some(schema) = &self.schema else { return Ok(()) };
        let Ok(json) = serde_json::from_str::<Value>(text) else { return reject("json_schema", "it is no JSON") };
        schema.validate(&json).or_else(|error| reject("json_schema", error.to_string()))
    }
}

/// The program of a judge, found as a shell finds it.
///
/// # Errors
/// There is none.
pub fn find(command: &[String]) -> Result<()> {
    let Some(name) = command.first() else { return Ok(()) };
    let runs =
        |path: &Path| path.metadata().is_ok_and(|there| there.is_file() && there.permissions().mode() & 0o111 != 0);
    let found = match name.contains('/') {
        true => runs(Path::new(name)),
        false => {
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|folder| runs(&folder.join(name)))
        }
    };
    ensure!(found, "dream.judge: command: {name} is no program that can be run");
    Ok(())
}

/// Ends a program and what it started.
fn end(child: &mut Child) {
    if let Some(group) = Pid::from_raw(child.id() as i32) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

/// A file in memory that holds the text: a program may read it when it likes, or not at all.
fn as_input(text: &str) -> std::io::Result<Stdio> {
    let mut file = File::from(memfd_create("case", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file.into())
}

/// Gives the program the case on its standard input; exit status 0 accepts.
fn by_command(command: &[String], case: &Case<'_>) -> Result<Verdict> {
    let name = &command[0];
    let case = json!({"messages": case.messages, "instruction": case.instruction, "answer": case.answer}).to_string();
    let mut child = Command::new(name)
        .args(&command[1..])
        .stdin(as_input(&case).context("dream.judge.command: no memory for its input")?)
        .stdout(Stdio::null())
        .process_group(0)
        .env_remove("APOLLOD_API_KEY")
        .env_remove("APOLLOD_HTTP_API_KEY")
        .spawn()
        .with_context(|| format!("dream.judge.command: cannot run {name}"))?;
    let deadline = Instant::now() + COMMAND_PATIENCE;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(Ok(())),
            Some(status) => return Ok(reject("command", format!("{name}: {status}"))),
            None if Instant::now() > deadline => {
                end(&mut child);
                bail!("dream.judge.command: {name} did not end within {COMMAND_PATIENCE:?}");
            }
            None => std::thread::sleep(COMMAND_POLL),
        }
    }
}

fn by_rubric(chat: &Chat, rubric: &str, case: &Case<'_>) -> Result<Verdict> {
    let question = case.messages.last().and_then(|message| message["content"].as_str()).unwrap_or_default();
    let asked = format!(
        "Question:\n{question}\n\nAnswer:\n{}\n\nCriterion:\n{rubric}\n\nDoes the answer meet the criterion? Say yes or no.",
        case.answer
    );
    let messages = [
        json!({"role": "system", "content": "You judge answers strictly. You say yes or no, nothing else."}),
        json!({"role": "user", "content": asked}),
    ];
    let said = chat.ask(&messages, 0.0, 0)?.text;
    let yes = said.trim_start_matches(|c: char| !c.is_alphanumeric()).to_lowercase().starts_with("yes");
    let said: String = said.chars().take(40).collect();
    Ok(if yes { Ok(()) } else { reject("rubric", format!("asked for yes or no, it said {said:?}")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(judge: Judge, text: &str) -> Verdict {
        Judges::new(&judge).unwrap().by_text(&Answer { text: text.into(), ended: true })
    }

    #[test]
    fn each_check_of_the_text_accepts_and_rejects() {
        let some = |text: &str| Some(text.to_owned());
        let schema = json!({"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}});
        for (judge, good, bad) in [
            (Judge { matches: some("^Arr"), ..Judge::default() }, "Arr, aye", "aye, Arr"),
            (Judge { rejects: some("(?i)as an ai"), ..Judge::default() }, "Aye", "As an AI, no"),
            (Judge { min_chars: Some(3), ..Judge::default() }, "äöü", "äö"),
            (Judge { max_chars: Some(3), ..Judge::default() }, "äöü", "äöüß"),
            (Judge { json_schema: Some(schema.clone()), ..Judge::default() }, "{\"a\": 1}", "{\"a\": \"1\"}"),
            (Judge { json_schema: Some(schema), ..Judge::default() }, "{\"a\": 1}", "a: 1"),
            (Judge::default(), "anything", ""),
        ] {
            assert_eq!(verdict(judge.clone(), good), Ok(()), "{judge:?}");
            assert!(verdict(judge.clone(), bad).is_err(), "{judge:?}");
        }
        let cut = Answer { text: "and then".into(), ended: false };
        assert!(Judges::new(&Judge::default()).unwrap().by_text(&cut).is_err());
    }

    #[test]
    fn a_judge_that_cannot_judge_is_refused_by_name() {
        let some = |text: &str| Some(text.to_owned());
        for (judge, name) in [
            (Judge { matches: some("("), ..Judge::default() }, "matches:"),
            (Judge { rejects: some("["), ..Judge::default() }, "rejects:"),
            (Judge { json_schema: Some(json!({"type": "strng"})), ..Judge::default() }, "json_schema:"),
            (Judge { min_chars: Some(2), max_chars: Some(1), ..Judge::default() }, "min_chars:"),
            (Judge { command: Some(Vec::new()), ..Judge::default() }, "command:"),
            (Judge { rubric: some(" "), ..Judge::default() }, "rubric:"),
            (Judge { min_divergence: Some(f64::NAN), ..Judge::default() }, "min_divergence:"),
        ] {
            let error = Judges::new(&judge).unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    fn only_what_looks_at_the_text_can_say_that_it_is_known() {
        assert!(!Judges::new(&Judge { min_divergence: Some(0.1), ..Judge::default() }).unwrap().judge_text());
        assert!(Judges::new(&Judge { max_chars: Some(9), ..Judge::default() }).unwrap().judge_text());
    }

    #[test]
    fn a_program_reads_the_case_and_accepts_by_its_exit_status() {
        let case = Case { messages: &[json!({"role": "user", "content": "hi"})], instruction: "shout", answer: "HI" };
        let run = |script: &str| by_command(&["sh".into(), "-c".into(), script.into()], &case);
        assert_eq!(run("grep -q '\"answer\":\"HI\"'").unwrap(), Ok(()));
        assert_eq!(run("grep -q '\"instruction\":\"shout\"'").unwrap(), Ok(()));
        let rejection = run("grep -q nowhere").unwrap().unwrap_err();
        assert_eq!((rejection.by, rejection.reason.as_str()), ("command", "sh: exit status: 1"));
        assert_eq!(run("exit 0").unwrap(), Ok(()), "one that reads nothing");
        assert!(find(&["sh".into()]).is_ok() && find(&["/bin/sh".into()]).is_ok());
        assert!(find(&["no-such-judge".into()]).is_err() && find(&["/etc/passwd".into()]).is_err());
        assert!(by_command(&["/nonexistent".into()], &case).is_err());
    }
}
