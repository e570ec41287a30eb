//! Documents packed into rows of T tokens.
//! ids (B,T) u32 · at (N): flat positions whose next token counts · targets (N): those tokens
//!
//! Each row begins at the start of a document, because a served conversation begins at position 0.
//! Documents in a row see each other: so the model also answers after an unrelated conversation.

use anyhow::{Context, Result, anyhow};
use candle_core::{Device, Tensor};

use crate::text::{END_OF_TEXT, Piece, Writer};
use crate::vocabulary::Trained;

/// What one training step reads.
pub struct Batch {
    /// (B,T), u32.
    pub ids: Tensor,
    /// (N), u32: positions in the flattened (B·T) hidden states.
    pub at: Tensor,
    /// (N), u32: the token that follows each of them.
    pub targets: Tensor,
}

/// Token ids of a text in which special tokens may be written out.
pub fn encode(tokenizer: &Trained, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode(text, false).map_err(|e| anyhow!("cannot encode {text:?}: {e}"))?;
    Ok(encoding.get_ids().to_vec())
}

/// The id of a special token.
pub fn special(tokenizer: &Trained, token: &str) -> Result<u32> {
    tokenizer.token_to_id(token).with_context(|| format!("the tokenizer has no token {token}"))
}

/// Packs the writer's documents.
pub struct Packer<'a> {
    writer: Writer<'a>,
    tokenizer: &'a Trained,
    separator: u32,
    waiting: Option<Vec<(u32, bool)>>,
}

impl<'a> Packer<'a> {
    /// Reads documents from `writer` as needed.
    pub fn new(writer: Writer<'a>, tokenizer: &'a Trained) -> Result<Self> {
        Ok(Self { writer, tokenizer, separator: special(tokenizer, END_OF_TEXT)?, waiting: None })
    }

    /// The next `rows` rows of `length` tokens.
    pub fn batch(&mut self, rows: usize, length: usize) -> Result<Batch> {
        let (mut ids, mut at, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rows {
            // One token more than the row: the last position also has a next token.
            let row = self.row(length + 1)?;
            for (i, pair) in row.windows(2).enumerate() {
                if pair[1].1 {
                    at.push((ids.len() + i) as u32);
                    targets.push(pair[1].0);
                }
            }
            ids.extend(row[..length].iter().map(|(id, _)| *id));
        }
        let n = at.len();
        Ok(Batch {
            ids: Tensor::from_vec(ids, (rows, length), &Device::Cpu)?,
            at: Tensor::from_vec(at, n, &Device::Cpu)?,
            targets: Tensor::from_vec(targets, n, &Device::Cpu)?,
        })
    }

    fn row(&mut self, length: usize) -> Result<Vec<(u32, bool)>> {
        let mut row: Vec<(u32, bool)> = Vec::with_capacity(length);
        loop {
            let document = match self.waiting.take() {
                Some(document) => document,
                None => self.tokens()?,
            };
            if document.len() > length {
                continue;
            }
            if row.len() + document.len() > length {
                self.waiting = Some(document);
                row.resize(length, (self.separator, false));
                return Ok(row);
            }
            row.extend(document);
            if row.len() < length && row.last().is_some_and(|(id, _)| *id != self.separator) {
                row.push((self.separator, false));
            }
        }
    }

    fn tokens(&mut self) -> Result<Vec<(u32, bool)>> {
        let mut tokens = Vec::new();
        for Piece { text, counts } in self.writer.document() {
            tokens.extend(encode(self.tokenizer, &text)?.into_iter().map(|id| (id, counts)));
        }
        Ok(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{TURN_END, TURN_START};
    use crate::world::facts;

    #[test]
    fn targets_are_the_tokens_that_follow_and_each_answer_ends_its_turn() {
        let facts = facts();
        let lines: Vec<String> = facts.iter().map(|f| format!("{} {}", f.asked[0], f.answer)).collect();
        let tokenizer = crate::vocabulary::train(&lines, 600).expect("tokenizer");
        let mut packer = Packer::new(Writer::new(&facts, 9), &tokenizer).expect("packer");
        let batch = packer.batch(8, 128).expect("batch");
        let ids: Vec<u32> = batch.ids.flatten_all().and_then(|t| t.to_vec1()).expect("ids");
        let at: Vec<u32> = batch.at.to_vec1().expect("positions");
        let targets: Vec<u32> = batch.targets.to_vec1().expect("targets");
        let [start, end] = [TURN_START, TURN_END].map(|t| special(&tokenizer, t).expect("special"));
        let assistant = encode(&tokenizer, "assistant").expect("encodes")[0];
        let header = encode(&tokenizer, "assistant\n").expect("encodes").len();
        let mut answers = 0;
        for (row, tokens) in ids.chunks(128).enumerate() {
            let mut role = None;
            for (i, pair) in tokens.windows(2).enumerate() {
                if pair[0] == start {
                    role = Some(pair[1]);
                }
                let target = at.iter().position(|p| *p as usize == row * 128 + i).map(|n| targets[n]);
                assert!(target.is_none_or(|t| t == pair[1] && t != start), "row {row}, position {i}");
                assert!(target.is_none() || pair[0] != end, "row {row}, position {i}: after the end of a turn");
                if i >= header && tokens[i - header] == start && role == Some(assistant) {
                    assert!(target.is_some(), "row {row}, position {i}: the first token of an answer");
                }
                if pair[1] == end {
                    assert_eq!(target.is_some(), role == Some(assistant), "row {row}, position {i}");
                    answers += usize::from(target.is_some());
                }
            }
        }
        assert!(answers > 10, "{answers} answers");
    }
}
