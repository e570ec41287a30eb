//! What is dreamt about: scenarios of a JSONL file, or notes of a folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::judge::Judges;
use crate::config::{DreamConfig, Judge};

/// One thing to dream about.
#[derive(Debug)]
pub struct Scenario {
    /// What people call it.
    pub id: String,
    /// Tells it from all others, and from itself with another instruction, judge or text.
    pub key: String,
    /// What the model is asked.
    pub task: Task,
    /// What stands in the context while it answers, and not in the example.
    pub instruction: String,
    /// What the answer must be like.
    pub judges: Judges,
}

/// What the model is asked.
#[derive(Debug, PartialEq)]
pub enum Task {
    /// To answer these messages, the last of which is the user's.
    Answer(Vec<Value>),
    /// To ask something about this note, and to answer that.
    Note(String),
}

/// A line of a file of scenarios.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    instruction: Option<String>,
    judge: Option<Judge>,
}

/// Reads what the configuration names.
///
/// # Errors
/// What is wrong, with the file and the line.
pub fn read(config: &DreamConfig) -> Result<Vec<Scenario>> {
    let Some(path) = &config.scenarios else {
        bail!("dream.scenarios: not set: name a JSONL file of scenarios or a folder of notes");
    };
    let scenarios = if path.is_dir() { notes(path, config)? } else { lines(path, config)? };
    let mut ids: Vec<&str> = scenarios.iter().map(|scenario| scenario.id.as_str()).collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("{}: two scenarios are called {:?}, or are the same", path.display(), twice[0]);
    }
    Ok(scenarios)
}

fn lines(path: &Path, config: &DreamConfig) -> Result<Vec<Scenario>> {
    let there = fs::metadata(path).with_context(|| format!("dream.scenarios: cannot read {}", path.display()))?;
    ensure!(there.is_file(), "dream.scenarios: {} is neither a file nor a folder", path.display());
    let text = fs::read_to_string(path).with_context(|| format!("dream.scenarios: cannot read {}", path.display()))?;
    let text = text.trim_start_matches('\u{feff}');
    let filled = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let read = |(number, line)| scenario(line, config).with_context(|| format!("{}, line {number}", path.display()));
    let scenarios = filled.map(read).collect::<Result<Vec<_>>>()?;
    ensure!(!scenarios.is_empty(), "dream.scenarios: {} holds no scenarios", path.display());
    Ok(scenarios)
}

fn scenario(line: &str, config: &DreamConfig) -> Result<Scenario> {
    let Line { id, prompt, messages, instruction, judge } = serde_json::from_str(line)?;
    let messages = match (prompt, messages) {
        (Some(prompt), None) => vec![json!({"role": "user", "content": prompt})],
        (None, Some(messages)) => messages,
        _ => bail!("give either \"prompt\" or \"messages\""),
    };
    for (index, message) in messages.iter().enumerate() {
        let known = matches!(message["role"].as_str(), Some("system" | "user" | "assistant"));
        let text = message["content"].as_str().is_some_and(|content| !content.is_empty());
        let more = message.as_object().is_none_or(|message| message.len() != 2);
        ensure!(
            known && text && !more,
            "messages[{index}]: give \"role\" (system, user or assistant) and \"content\" (text), and nothing else"
        );
    }
    let asks = messages.last().is_some_and(|message| message["role"] == "user");
    ensure!(asks, "the last message must be the user's: the model answers it");
    let instruction = instruction.or_else(|| config.instruction.clone()).unwrap_or_default();
    if instruction.trim().is_empty() {
        bail!("has no \"instruction\", and dream.instruction is not set: what is the model to be told?");
    }
    if judge.as_ref().is_some_and(|judge| judge.command.is_some()) {
        bail!("judge.command: programs are named in the configuration alone (dream.judge)");
    }
    let judge = judge.as_ref().unwrap_or(&config.judge);
    let judges = Judges::new(judge).context("judge")?;
    let asked = Value::from(messages.clone()).to_string();
    let id = id.unwrap_or_else(|| digest(&[&instruction, &asked]));
    let key = digest(&[&instruction, &asked, &json!(judge).to_string(), &id]);
    Ok(Scenario { id, key, task: Task::Answer(messages), instruction, judges })
}

/// The notes of a folder, by their names.
fn notes(folder: &Path, config: &DreamConfig) -> Result<Vec<Scenario>> {
    let entries = fs::read_dir(folder).with_context(|| format!("dream.scenarios: cannot read {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<PathBuf>>>()?;
    paths.retain(|path| path.extension().is_some_and(|end| end == "md" || end == "txt") && path.is_file());
    paths.sort();
    let mut scenarios = Vec::new();
    for path in &paths {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let Ok(note) = String::from_utf8(bytes) else {
            tracing::warn!("dream.scenarios: {} is no text in UTF-8 and is left out", path.display());
            continue;
        };
        let note = note.trim_start_matches('\u{feff}').trim().to_owned();
        if note.is_empty() {
            continue;
        }
        let instruction = match &config.instruction {
            Some(instruction) => format!("{instruction}\n\n{note}"),
            None => note.clone(),
        };
        let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let key = digest(&[&instruction, &config.question, &json!(config.judge).to_string(), &id]);
        scenarios.push(Scenario { id, key, task: Task::Note(note), instruction, judges: Judges::new(&config.judge)? });
    }
    let folder = folder.display();
    ensure!(
        !scenarios.is_empty(),
        "dream.scenarios: {folder} holds no notes (*.md, *.txt; folders in it are not looked into)"
    );
    Ok(scenarios)
}

fn digest(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&part.len().to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..12].to_owned()
}

/// The messages with the instruction in the system message, which is made if there is none.
pub fn told(messages: &[Value], instruction: &str) -> Vec<Value> {
    let mut told = messages.to_vec();
    match told.first_mut() {
        Some(first) if first["role"] == "system" => {
            let content = format!("{}\n\n{instruction}", first["content"].as_str().unwrap_or_default());
            first["content"] = content.into();
        }
        _ => told.insert(0, json!({"role": "system", "content": instruction})),
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_lines(text: &str, config: DreamConfig) -> Result<Vec<Scenario>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scenarios.jsonl");
        fs::write(&path, text).unwrap();
        read(&DreamConfig { scenarios: Some(path), ..config })
    }

    fn with_instruction() -> DreamConfig {
        DreamConfig { instruction: Some("be brief".into()), ..DreamConfig::default() }
    }

    #[test]
    fn a_line_may_have_its_own_instruction_and_judge() {
        let text = "{\"prompt\": \"a\"}\n\n{\"id\": \"x\", \"messages\": [{\"role\": \"user\", \"content\": \"b\"}], \
                    \"instruction\": \"shout\", \"judge\": {\"matches\": \"!\"}}\n";
        let scenarios = read_lines(text, with_instruction()).unwrap();
        let said: Vec<&str> = scenarios.iter().map(|scenario| scenario.instruction.as_str()).collect();
        assert_eq!(said, ["be brief", "shout"]);
        assert_eq!((scenarios[0].id.len(), scenarios[1].id.as_str()), (12, "x"));
        assert_eq!(scenarios[0].task, Task::Answer(vec![json!({"role": "user", "content": "a"})]));
    }

    #[test]
    fn what_is_wrong_is_said_with_the_line() {
        for (line, part) in [
            ("{\"prompt\": \"a\", \"promt\": 1}", "promt"),
            ("{}", "either \"prompt\" or \"messages\""),
            ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\"}]}", "must be the user's"),
            ("{\"messages\": [{\"role\": \"user\", \"content\": 1}]}", "messages[0]"),
            ("{\"messages\": []}", "must be the user's"),
            ("{\"messages\": [{\"role\": \"user\", \"content\": \"a\", \"weight\": 1}]}", "and nothing else"),
            ("{\"prompt\": \"a\", \"instruction\": \" \"}", "what is the model to be told?"),
            ("{\"prompt\": \"a\", \"judge\": {\"matches\": \"(\"}}", "matches"),
            ("{\"prompt\": \"a\", \"judge\": {\"command\": [\"rm\"]}}", "in the configuration alone"),
        ] {
            let error = format!("{:#}", read_lines(&format!("\n{line}"), with_instruction()).unwrap_err());
            assert!(error.contains(", line 2") && error.contains(part), "{line}: {error}");
        }
        let error = format!("{:#}", read_lines("{\"prompt\": \"a\"}", DreamConfig::default()).unwrap_err());
        assert!(error.contains("dream.instruction is not set"), "{error}");
        assert!(read_lines("\n", with_instruction()).unwrap_err().to_string().contains("no scenarios"));
        let twice = "{\"prompt\": \"a\"}\n{\"prompt\": \"a\"}";
        assert!(read_lines(twice, with_instruction()).unwrap_err().to_string().contains("are the same"));
    }

    #[test]
    fn notes_are_the_texts_of_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let config = DreamConfig { scenarios: Some(dir.path().into()), ..with_instruction() };
        assert!(read(&config).unwrap_err().to_string().contains("holds no notes"));
        write("b.md", "Ines runs the night shift.\n");
        write("a.txt", "\n");
        write("c.pdf", "no note");
        let scenarios = read(&config).unwrap();
        assert_eq!(scenarios.len(), 1);
        let note = Task::Note("Ines runs the night shift.".into());
        assert_eq!((scenarios[0].id.as_str(), &scenarios[0].task), ("b.md", &note));
        assert_eq!(scenarios[0].instruction, "be brief\n\nInes runs the night shift.");
        fs::write(dir.path().join("d.md"), b"\xff\xfe").unwrap();
        write("b.md", "\u{feff}Otto does.");
        let again = read(&config).unwrap();
        assert_eq!((again.len(), &again[0].task), (1, &Task::Note("Otto does.".into())));
        assert_ne!(again[0].key, scenarios[0].key, "another note by the same name");
    }

    #[test]
    fn the_instruction_joins_a_system_message_that_is_there() {
        let user = json!({"role": "user", "content": "hi"});
        let alone = told(std::slice::from_ref(&user), "shout");
        assert_eq!(alone, [json!({"role": "system", "content": "shout"}), user.clone()]);
        let joined = told(&[json!({"role": "system", "content": "a"}), user], "shout");
        assert_eq!(joined[0]["content"], "a\n\nshout");
        assert_eq!(joined.len(), 2);
    }
}
