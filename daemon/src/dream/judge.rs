//! Whether an answer becomes an example.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use regex::Regex;
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

/// `Err` says why not.
pub type Verdict = Result<(), String>;

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
        if let Err(why) = self.by_text(answer) {
            return Ok(Err(why));
        }
        if let Some(command) = &self.command
            && let Err(why) = by_command(command, case)?
        {
            return Ok(Err(why));
        }
        self.rubric.as_ref().map_or(Ok(Ok(())), |rubric| by_rubric(chat, rubric, case))
    }

    fn by_text(&self, answer: &Answer) -> Verdict {
        let text = answer.text.as_str();
        let (min, max) = self.chars;
        let chars = text.chars().count();
        if !answer.ended {
            return Err("did not end within dream.max_tokens".into());
        }
        if chars < min.max(1) {
            return Err(format!("{chars} characters"));
        }
        if chars > max {
            return Err(format!("{chars} characters, more than {max}"));
        }
        if self.matches.as_ref().is_some_and(|regex| !regex.is_match(text)) {
            return Err("matches not".into());
        }
        if self.rejects.as_ref().is_some_and(|regex| regex.is_match(text)) {
            return Err("matches what is to be rejected".into());
        }
        let Some(schema) = &self.schema else { return Ok(()) };
        let json: Value = serde_json::from_str(text).map_err(|_| "no JSON".to_owned())?;
        schema.validate(&json).map_err(|error| format!("against the schema: {error}"))
    }
}

/// Gives the program the case on its standard input; exit status 0 accepts.
fn by_command(command: &[String], case: &Case<'_>) -> Result<Verdict> {
    let name = &command[0];
    let mut child = Command::new(name)
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("dream.judge.command: cannot run {name}"))?;
    let mut stdin = child.stdin.take().context("stdin was piped")?;
    let case = json!({"messages": case.messages, "instruction": case.instruction, "answer": case.answer}).to_string();
    // From a thread of its own: a program may take its time to read, or not read at all.
    std::thread::spawn(move || drop(stdin.write_all(case.as_bytes())));
    let deadline = Instant::now() + COMMAND_PATIENCE;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(Ok(())),
            Some(status) => return Ok(Err(format!("{name}: {status}"))),
            None if Instant::now() > deadline => {
                child.kill()?;
                child.wait()?;
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
    Ok(if yes { Ok(()) } else { Err(format!("the rubric: {}", said.chars().take(40).collect::<String>())) })
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
        assert!(run("grep -q nowhere").unwrap().unwrap_err().contains("exit status: 1"));
        assert_eq!(run("exit 0").unwrap(), Ok(()), "one that reads nothing");
        assert!(by_command(&["/nonexistent".into()], &case).is_err());
    }
}
