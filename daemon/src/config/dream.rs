//! `[dream]`: where examples come from when nobody posts any.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// `[dream]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DreamConfig {
    /// What to dream about: a JSONL file of scenarios, or a folder of notes (`*.md`, `*.txt`). No default: no dreams. Read
    /// anew for each dream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scenarios: Option<PathBuf>,
    /// When the daemon dreams by itself: five crontab fields, in `sync.timezone`. No default: only `apollod dream` does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// The guiding instruction: it stands in the context when the model answers, and not in the example that is made of the
    /// answer. No default; a scenario may have its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// What an answer must be like to become an example. A scenario may have its own.
    pub judge: Judge,
    /// What makes a question of a note. The note stands before it.
    pub question: String,
    /// Name of the model in requests. Default: the first that the server lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Examples that one dream makes. Default 8.
    pub examples: u64,
    /// Answers that one dream asks for at most. Default 64.
    pub attempts: u64,
    /// Tokens of an answer; one that does not end by itself within them is rejected. Default 512.
    pub max_tokens: u32,
    /// Share of the answers that should be accepted, in (0, 1). Default 0.7. Temperature rises while more are and falls while
    /// fewer are, and scenarios whose own share is near it are chosen more often.
    pub success_rate: f64,
    /// Temperature of the first answer of the first dream; later ones go on from where it has gone. Default 0.7.
    pub temperature: f64,
    /// Highest temperature; the lowest is 0. Default 1. Equal to 0 all answers are greedy.
    pub temperature_max: f64,
    /// Whether a scenario is passed over when the greedy answer without the instruction is accepted too, or, where no judge looks at the
    /// text, is nearly the same (`similarity_max`): there is nothing to learn. Default true. Costs an answer for each example.
    pub skip_known: bool,
    /// An answer is dropped when it shares more than this part of its three-word sequences with an example of the same dream,
    /// in [0, 1]. Default 0.8; 1 drops none.
    pub similarity_max: f64,
    /// Share of general examples among all that a dream posts, in [0, 0.9]. Default 0.25. They keep what is not dreamt of; they
    /// come from `replay_examples`, without which there are none.
    pub replay: f64,
    /// General examples, as `POST /v1/examples` takes them, one JSON object a line. No default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replay_examples: Option<PathBuf>,
}

impl Default for DreamConfig {
    fn default() -> Self {
        Self {
            scenarios: None,
            schedule: None,
            instruction: None,
            judge: Judge::default(),
            question:
                "Write one question that somebody could ask who does not have this note, and that the note answers. \
                       Give the question alone."
                    .into(),
            model: None,
            examples: 8,
            attempts: 64,
            max_tokens: 512,
            success_rate: 0.7,
            temperature: 0.7,
            temperature_max: 1.0,
            skip_known: true,
            similarity_max: 0.8,
            replay: 0.25,
            replay_examples: None,
        }
    }
}

/// What an answer must be like: all that is set has to hold. With nothing set, any answer that ends by itself will do.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Judge {
    /// Regular expression that matches somewhere in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matches: Option<String>,
    /// Regular expression that matches nowhere in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejects: Option<String>,
    /// Its least length in characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_chars: Option<usize>,
    /// Its greatest length in characters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_chars: Option<usize>,
    /// JSON schema: the whole answer is JSON that conforms to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Value>,
    /// Program with arguments that gets `{"messages", "instruction", "answer"}` as JSON on its standard input and accepts by
    /// exit status 0, within 30 s. A path is relative to the configuration file. Only in the configuration, not in a scenario.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// By how much the instruction must make it more likely on the live weights, in nats a token: below it the model would say
    /// it without being told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_divergence: Option<f64>,
    /// A criterion in words: the served model itself is asked whether the answer meets it, and has to begin with yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rubric: Option<String>,
}
