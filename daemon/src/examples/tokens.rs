//! The model's tokenizer, its end-of-sequence tokens and the size of its vocabulary.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use super::{Refusal, TextError};

/// tokenizer.json with what the other files say about it.
pub(super) struct Tokens {
    tokenizer: Tokenizer,
    special: HashSet<u32>,
    /// Tokens that end an answer: generation_config.json's, then config.json's, then tokenizer_config.json's.
    pub(super) eos: Vec<u32>,
    /// Rows of the embedding.
    pub(super) vocab_size: usize,
    /// A longer text has more tokens than an example may have.
    max_bytes: usize,
}

/// How much longer a text may be than its tokens' own text: normalizers drop and shorten.
const SHRINKING: usize = 4;

impl Tokens {
    pub(super) fn load(dir: &Path, max_tokens: usize) -> Result<Self, TextError> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| TextError::Read { path: path.clone(), source })?;
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|error| TextError::Content { path: path.clone(), reason: error.to_string() })?;
        // Some files carry the settings of the run that made them; an example is never cut or filled up in silence.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| TextError::Content { path: path.clone(), reason: error.to_string() })?;
        let special =
            tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).map(|(id, _)| id).collect();
        let config = read_json(&dir.join("config.json"))?.ok_or_else(|| TextError::Content {
            path: dir.join("config.json"),
            reason: "missing: not a Hugging Face model directory".into(),
        })?;
        let vocab_size = [&config["vocab_size"], &config["text_config"]["vocab_size"]]
            .into_iter()
            .find_map(Value::as_u64)
            .map_or_else(|| tokenizer.get_vocab_size(true), |size| size as usize);
        let eos = end_of_sequence(dir, &config, &tokenizer)?;
        let longest = tokenizer.get_vocab(true).keys().map(String::len).max().unwrap_or(1);
        let max_bytes = max_tokens.saturating_mul(longest).saturating_mul(SHRINKING);
        Ok(Self { tokenizer, special, eos, vocab_size, max_bytes })
    }

    /// Tokens of a text; `special` lets the tokenizer's post-processor add its own (such as a beginning of sequence).
    pub(super) fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Refusal> {
        // Before the tokenizer looks at it: that takes some 300 times the text's memory.
        if text.len() > self.max_bytes {
            let reason =
                format!("{} bytes of text are more than an example may have; at most {}", text.len(), self.max_bytes);
            return Err(Refusal::whole(reason));
        }
        let encoding = self
            .tokenizer
            .encode_fast(text, special)
            .map_err(|error| Refusal::whole(format!("the tokenizer cannot read it: {error}")))?;
        let ids = encoding.get_ids().to_vec();
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(ids),
            Some(id) => Err(Refusal::whole(format!(
                "tokenizer.json makes token {id} of it, but config.json's vocabulary has {}",
                self.vocab_size
            ))),
        }
    }

    /// Text with special tokens, for messages.
    pub(super) fn decode_all(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, false).unwrap_or_default()
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    pub(super) fn decoder(&self) -> Decoder<'_> {
        Decoder { tokenizer: &self.tokenizer, ids: Vec::new(), prefix: String::new(), prefix_index: 0 }
    }
}

/// Turns tokens into text one at a time.
pub struct Decoder<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
}

impl Decoder<'_> {
    /// The text that this token completes; `None` while a character is still in pieces.
    pub fn step(&mut self, id: u32) -> Option<String> {
        tokenizers::tokenizer::step_decode_stream(
            self.tokenizer,
            vec![id],
            true,
            &mut self.ids,
            &mut self.prefix,
            &mut self.prefix_index,
        )
        .ok()
        .flatten()
    }
}

/// A JSON file; `None` when there is none.
pub fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(TextError::Read { path: path.into(), source }),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| TextError::Content { path: PathBuf::from(path), reason: error.to_string() })
}

fn end_of_sequence(dir: &Path, config: &Value, tokenizer: &Tokenizer) -> Result<Vec<u32>, TextError> {
    let generation = read_json(&dir.join("generation_config.json"))?.unwrap_or_default();
    let of_tokenizer = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let mut found = Vec::new();
    for ids in [&generation["eos_token_id"], &config["eos_token_id"], &config["text_config"]["eos_token_id"]] {
        match ids {
            Value::Array(list) => found.extend(list.iter().filter_map(Value::as_u64)),
            one => found.extend(one.as_u64()),
        }
    }
    let mut eos: Vec<u32> = found.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
    eos.extend(token_text(&of_tokenizer["eos_token"]).and_then(|text| tokenizer.token_to_id(text)));
    let mut seen = HashSet::new();
    eos.retain(|id| seen.insert(*id));
    Ok(eos)
}

/// The text of a special token, which is a string or an object with `content`.
pub fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}
