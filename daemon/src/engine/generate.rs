//! Token by token: logits from the live weights, a choice, and text as soon as it is whole.

use super::Engine;
use std::ops::ControlFlow;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Only the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Of the random choice.
    pub seed: u64,
    /// Longest answer in tokens.
    pub max_tokens: usize,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model said so.
    Stop,
    /// `max_tokens`, or the model's context is full.
    Length,
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Its text, special tokens left out.
    pub text: String,
    /// Tokens generated, the end-of-turn token included.
    pub tokens: usize,
    /// Why it ended.
    pub finish: Finish,
}

impl Engine {
    /// Continues `prompt`; `on_text` sees each piece of text and may break off.
    pub fn generate(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        mut on_text: impl FnMut(&str) -> ControlFlow<()> + Send,
    ) -> Answer {
        let model = self.model.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let room = self.max_tokens.saturating_sub(prompt.len()).min(sampling.max_tokens);
        let mut text = model.text(prompt.len() + room);
        let mut random = Random(sampling.seed, 0);
        let mut decoder = self.templates.decoder();
        let mut answer = Answer { text: String::new(), tokens: 0, finish: Finish::Length };
        let mut next = prompt.to_vec();
        while answer.tokens < room {
            let step = self.gate.step();
            let logits = text(&next);
            drop(step);
            let token = choose(logits, sampling, &mut random);
            answer.tokens += 1;
            if self.templates.eos().contains(&token) {
                answer.finish = Finish::Stop;
                break;
            }
            if let Some(text) = decoder.step(token) {
                answer.text.push_str(&text);
                if on_text(&text).is_break() {
                    break;
                }
            }
            next = vec![token];
        }
        answer
    }
}

fn choose(logits: Vec<f32>, sampling: &Sampling, random: &mut Random) -> u32 {
    let best = |values: &[f32]| {
        let top = values.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
        top.map_or(0, |(i, _)| i as u32)
    };
    if sampling.temperature <= 0.0 {
        return best(&logits);
    }
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut weights: Vec<(usize, f32)> =
        logits.iter().enumerate().map(|(i, l)| (i, ((l - top) / sampling.temperature).exp())).collect();
    weights.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total: f32 = weights.iter().map(|w| w.1).sum();
    let mut kept = 0.0;
    let nucleus = weights.iter().position(|w| {
        kept += w.1;
        kept >= sampling.top_p * total
    });
    weights.truncate(nucleus.map_or(weights.len(), |n| n + 1));
    let mut point = random.next() * weights.iter().map(|w| w.1).sum::<f32>();
    for (token, weight) in &weights {
        point -= weight;
        if point <= 0.0 {
            return *token as u32;
        }
    }
    weights.last().map_or(best(&logits), |w| w.0 as u32)
}

/// Uniform numbers in 0..1 from a seed and a counter.
struct Random(u64, u32);

impl Random {
    fn next(&mut self) -> f32 {
        self.1 += 1;
        let word = compute::Philox::block([self.0 as u32, (self.0 >> 32) as u32], [self.1, 0, 0, 0])[0];
        (word >> 8) as f32 / (1 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nucleus_leaves_out_unlikely_tokens() {
        let logits = vec![0.0, 5.0, 4.9, -3.0];
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 3, max_tokens: 1 };
        let mut random = Random(3, 0);
        let chosen: Vec<u32> = (0..200).map(|_| choose(logits.clone(), &sampling, &mut random)).collect();
        assert!(chosen.iter().all(|t| [1, 2].contains(t)));
        assert!(chosen.contains(&1) && chosen.contains(&2));
        let greedy = Sampling { temperature: 0.0, ..sampling };
        assert_eq!(choose(logits, &greedy, &mut random), 1);
    }
}
