//! From what a client posts to tokens and decision spans.
//!
//! An example comes in one of three forms: chat messages (the model's own template renders them), a context and a
//! decision as text, or both as token ids. What comes out is one sequence of tokens and the spans in it that are
//! learned; every other token is context and gets no gradient.

mod chat;
mod file;
mod input;
mod template;
mod tokens;

#[cfg(test)]
#[path = "../../tests/support/tiny_model.rs"]
pub mod tiny_model;

use std::ops::Range;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

pub use file::read;
pub use input::Example;
pub use template::source as chat_template;
pub use tokens::{Decoder, read_json, token_text};

use input::Form;
use template::ChatTemplate;
use tokens::Tokens;

/// An example as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// All tokens, context and decisions.
    pub ids: Vec<u32>,
    /// The decision spans within `ids`: ascending, disjoint, none empty, each starting at 1 or later.
    pub spans: Vec<Range<usize>>,
}

/// Why an example was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{}{reason}", field.as_ref().map(|field| format!("{field}: ")).unwrap_or_default())]
pub struct Refusal {
    /// The field at fault, such as `messages[2].role`; `None` when it is the whole example.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What is wrong with it.
    pub reason: String,
}

impl Refusal {
    /// A refusal of one field.
    pub fn of(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: Some(field.into()), reason: reason.into() }
    }

    /// A refusal of the whole example.
    pub fn whole(reason: impl Into<String>) -> Self {
        Self { field: None, reason: reason.into() }
    }
}

/// Why a model directory's texts could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file that could not be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Content {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A model's tokenizer and chat template, and the rules that make examples of them.
pub struct Templates {
    tokens: Tokens,
    /// `None` for a model without one: chat examples are refused.
    template: Option<ChatTemplate>,
    max_tokens: usize,
}

impl Templates {
    /// Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, config.json and generation_config.json from
    /// a model directory. Examples of more than `max_tokens` tokens will be refused.
    ///
    /// # Errors
    /// [`TextError`] for a file that is missing (the first and the fourth are required), unreadable or malformed.
    pub fn load(dir: &Path, max_tokens: usize) -> Result<Self, TextError> {
        let tokens = Tokens::load(dir, max_tokens)?;
        let template = ChatTemplate::load(dir)?;
        Ok(Self { tokens, template, max_tokens })
    }

    /// Makes tokens of one example as a client posted it.
    ///
    /// # Errors
    /// A [`Refusal`] that names the field: malformed, empty, too long or not tokenizable.
    pub fn prepare(&self, posted: &Value) -> Result<(Example, Prepared), Refusal> {
        let example = Example::parse(posted)?;
        let prepared = match &example.form {
            Form::Chat { messages, decisions, tools } => self.chat(messages, decisions, tools.as_ref())?,
            Form::Text { context, decision, append_eos } => self.text(context, decision, *append_eos)?,
            Form::Ids { context, decision } => self.ids(context, decision)?,
        };
        self.check_length(prepared.ids.len())?;
        Ok((example, prepared))
    }

    /// Whether so many tokens are taken.
    ///
    /// # Errors
    /// A [`Refusal`] with the limit.
    pub fn check_length(&self, tokens: usize) -> Result<(), Refusal> {
        if tokens <= self.max_tokens {
            return Ok(());
        }
        let limit = self.max_tokens;
        let reason = "train.max_tokens, or the model's own limit if that is lower";
        Err(Refusal::whole(format!("{tokens} tokens, at most {limit} are taken ({reason}): shorten it")))
    }

    /// The tokens of a conversation that waits for the model's answer.
    ///
    /// # Errors
    /// A [`Refusal`] when there is no template, or what the template says about the messages.
    pub fn render_prompt(&self, messages: &[Value]) -> Result<Vec<u32>, Refusal> {
        self.render(messages, None, true)
    }

    /// The tokens of a text, with the tokenizer's own special tokens.
    ///
    /// # Errors
    /// A [`Refusal`] with what the tokenizer says.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Refusal> {
        self.tokens.encode(text, true)
    }

    /// An incremental decoder: text comes out as soon as it is whole characters.
    pub fn decoder(&self) -> Decoder<'_> {
        self.tokens.decoder()
    }

    /// The tokens that end an answer, the preferred one first.
    pub fn eos(&self) -> &[u32] {
        &self.tokens.eos
    }

    /// Whether the chat template has a place for `reasoning_content`.
    pub fn renders_reasoning(&self) -> bool {
        self.template.as_ref().is_some_and(ChatTemplate::renders_reasoning)
    }

    fn text(&self, context: &str, decision: &str, append_eos: bool) -> Result<Prepared, Refusal> {
        if decision.is_empty() {
            return Err(Refusal::of("decision", "empty: there is nothing to learn"));
        }
        let mut ids = self.tokens.encode(context, true)?;
        let start = ids.len();
        if start == 0 {
            return Err(Refusal::of("context", "empty: the first decision token needs something to follow"));
        }
        ids.extend(self.tokens.encode(decision, false)?);
        if append_eos {
            let Some(&eos) = self.tokens.eos.first() else {
                let reason = "the model names no end-of-sequence token; set append_eos to false";
                return Err(Refusal::of("append_eos", reason));
            };
            ids.push(eos);
        }
        if ids.len() == start {
            return Err(Refusal::of("decision", "empty: there is nothing to learn"));
        }
        let end = ids.len();
        Ok(Prepared { ids, spans: std::iter::once(start..end).collect() })
    }

    fn ids(&self, context: &[u32], decision: &[u32]) -> Result<Prepared, Refusal> {
        for (field, ids) in [("context_ids", context), ("decision_ids", decision)] {
            if ids.is_empty() {
                return Err(Refusal::of(field, "empty"));
            }
            if let Some(at) = ids.iter().position(|&id| id as usize >= self.tokens.vocab_size) {
                return Err(Refusal::of(
                    format!("{field}[{at}]"),
                    format!("{} is no token: the vocabulary has {}", ids[at], self.tokens.vocab_size),
                ));
            }
        }
        let ids = [context, decision].concat();
        let span = context.len()..ids.len();
        Ok(Prepared { ids, spans: std::iter::once(span).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::tiny_model::{CHATML, ENDOFTEXT, IM_END};
    use super::*;
    use serde_json::json;

    fn templates(max_tokens: usize) -> (tempfile::TempDir, Templates) {
        let dir = tempfile::tempdir().unwrap();
        tiny_model::write(dir.path(), CHATML);
        let templates = Templates::load(dir.path(), max_tokens).unwrap();
        (dir, templates)
    }

    #[test]
    fn text_is_context_then_decision_then_end_of_sequence() {
        let (_dir, templates) = templates(100);
        let (_, prepared) = templates.prepare(&json!({"context": "2+2=", "decision": "4"})).unwrap();
        assert_eq!(templates.tokens.decode_all(&prepared.ids[..4]), "2+2=");
        assert_eq!(prepared.ids[4..], [u32::from(b'4'), IM_END]);
        assert_eq!(prepared.spans, Vec::from_iter(Some(4..6)));
    }

    #[test]
    fn append_eos_false_leaves_the_end_of_sequence_out() {
        let (_dir, templates) = templates(100);
        let posted = json!({"context": "2+2=", "decision": "4", "append_eos": false});
        assert_eq!(templates.prepare(&posted).unwrap().1.spans, Vec::from_iter(Some(4..5)));
    }

    #[test]
    fn token_ids_are_taken_as_they_are() {
        let (_dir, templates) = templates(100);
        let (_, prepared) = templates.prepare(&json!({"context_ids": [1, 2], "decision_ids": [3]})).unwrap();
        assert_eq!(prepared, Prepared { ids: vec![1, 2, 3], spans: std::iter::once(2..3).collect() });
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_refused_by_place() {
        let (_dir, templates) = templates(100);
        let refusal = templates.prepare(&json!({"context_ids": [1], "decision_ids": [3, 259]})).unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("decision_ids[1]"));
        assert!(refusal.reason.contains("259"), "{refusal}");
    }

    #[test]
    fn empty_and_too_long_examples_are_refused() {
        let (_dir, templates) = templates(5);
        let field = |posted: Value| templates.prepare(&posted).unwrap_err().field.unwrap_or_default();
        assert_eq!(field(json!({"context": "", "decision": "x"})), "context");
        assert_eq!(field(json!({"context": "x", "decision": "", "append_eos": false})), "decision");
        assert_eq!(field(json!({"context_ids": [], "decision_ids": [1]})), "context_ids");
        templates.prepare(&json!({"context": "abc", "decision": "d"})).unwrap();
        let refusal = templates.prepare(&json!({"context": "abcd", "decision": "e"})).unwrap_err();
        assert!(refusal.reason.contains("6 tokens, at most 5 are taken"), "{refusal}");
    }

    #[test]
    fn the_preferred_end_of_sequence_is_generation_configs_first() {
        let (_dir, templates) = templates(100);
        assert_eq!(templates.eos(), [IM_END, ENDOFTEXT]);
    }

    #[test]
    fn a_multi_byte_character_comes_out_of_the_decoder_once_it_is_whole() {
        let (_dir, templates) = templates(100);
        let mut decoder = templates.decoder();
        let ids = templates.encode("aß").unwrap();
        let pieces: Vec<Option<String>> = ids.iter().map(|&id| decoder.step(id)).collect();
        assert_eq!(pieces, [Some("a".into()), None, Some("ß".into())]);
        assert_eq!(templates.tokens.decode_all(&ids), "aß");
    }
}
