//! Are the greedy answers right, word for word?
//!
//! A greedy answer equals the wanted one exactly if, with the wanted answer as input, the most
//! likely token at every position is the wanted one; so one forward pass checks many questions.

use anyhow::{Result, anyhow};
use candle_core::{D, Device, Tensor};

use crate::batch::{encode, special};
use crate::network::{Network, cross_entropy};
use crate::text::{END_OF_TEXT, TURN_END, prompt};
use crate::vocabulary::Trained;
use crate::world::Fact;

/// Questions in one forward pass.
const AT_ONCE: usize = 64;

/// How many answers were right.
#[derive(Default)]
pub struct Scores {
    /// Questions asked.
    pub asked: usize,
    /// Answers right to the last token, the end of the turn included.
    pub right: usize,
    /// Sum of the mean loss of the answers, nats a token.
    pub loss: f64,
    /// The questions that went wrong.
    pub wrong: Vec<String>,
}

impl Scores {
    /// Share of right answers, 0 to 1.
    pub fn share(&self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }
}

/// Asks the questions that `which` picks from each fact.
pub fn exact(net: &Network, tokenizer: &Trained, facts: &[Fact], which: impl Fn(&Fact) -> &[String]) -> Result<Scores> {
    let pairs: Vec<(&str, &str)> =
        facts.iter().flat_map(|f| which(f).iter().map(|q| (q.as_str(), f.answer.as_str()))).collect();
    let mut scores = Scores::default();
    for pairs in pairs.chunks(AT_ONCE) {
        check(net, tokenizer, pairs, &mut scores)?;
    }
    Ok(scores)
}

fn check(net: &Network, tokenizer: &Trained, pairs: &[(&str, &str)], scores: &mut Scores) -> Result<()> {
    let mut rows = Vec::new();
    for (question, answer) in pairs {
        let asked = encode(tokenizer, &prompt(question))?;
        let answer = encode(tokenizer, &format!("{answer}{TURN_END}"))?;
        rows.push((asked.len(), [asked, answer].concat()));
    }
    let length = rows.iter().map(|(_, row)| row.len()).max().unwrap_or(0);
    // Rows end in padding, which no earlier token can see.
    let padding = special(tokenizer, END_OF_TEXT)?;
    let ids: Vec<u32> = rows
        .iter()
        .flat_map(|(_, row)| row.iter().copied().chain(std::iter::repeat_n(padding, length - row.len())))
        .collect();
    let (hidden, _) = net.hidden(&Tensor::from_vec(ids, (rows.len(), length), &Device::Cpu)?, None)?;
    for (i, ((start, row), (question, _))) in rows.iter().zip(pairs).enumerate() {
        let wanted = &row[*start..];
        let logits = net.logits(&hidden.narrow(0, i * length + start - 1, wanted.len())?)?;
        let said: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
        let targets = Tensor::from_slice(wanted, wanted.len(), &Device::Cpu)?;
        scores.loss += f64::from(cross_entropy(&logits, &targets)?.to_scalar::<f32>()?);
        scores.asked += 1;
        if said == wanted {
            scores.right += 1;
        } else {
            scores.wrong.push((*question).to_string());
        }
    }
    Ok(())
}

/// The greedy answer to one question, at most 40 tokens, without its end-of-turn token.
pub fn answer(net: &Network, tokenizer: &Trained, question: &str) -> Result<String> {
    let end = special(tokenizer, TURN_END)?;
    let mut input = encode(tokenizer, &prompt(question))?;
    let (mut past, mut said) = (None, Vec::new());
    for _ in 0..40 {
        let ids = Tensor::from_slice(&input, (1, input.len()), &Device::Cpu)?;
        let (hidden, cache) = net.hidden(&ids, past.as_deref())?;
        let logits = net.logits(&hidden.narrow(0, input.len() - 1, 1)?)?;
        let token = logits.argmax(D::Minus1)?.to_vec1::<u32>()?[0];
        if token == end {
            break;
        }
        said.push(token);
        (past, input) = (Some(cache), vec![token]);
    }
    tokenizer.decode(&said, false).map_err(|e| anyhow!("cannot decode {said:?}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::facts;

    #[test]
    fn the_kept_model_answers_every_plain_question_and_generates_what_the_check_says() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("model");
        let (net, tokenizer) = crate::export::read(&dir).expect("the kept model loads");
        let facts = facts();
        let scores = exact(&net, &tokenizer, &facts, |f| &f.asked[..1]).expect("asks");
        assert_eq!((scores.right, scores.wrong), (facts.len(), vec![]));
        for fact in facts.iter().step_by(40) {
            assert_eq!(answer(&net, &tokenizer, &fact.asked[0]).expect("answers"), fact.answer);
        }
    }
}
