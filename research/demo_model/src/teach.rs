//! Can the model be taught one new answer in a few steps, without changing the others?
//! This is what the demo does over HTTP; here it is done with candle, to choose examples, learning
//! rate and number of steps.
//!
//! One step is context-frozen: keys and values of the context but its last token are constants, and
//! the loss is the mean over the tokens of the answer and its end of turn. APOLLO (arXiv:2412.05270,
//! Algorithm 1) updates the matrices:
//! G (m,n), d = min(m,n) · P (r,d) ~ N(0,1/r) · R = P·G (r,n), or G·Pᵀ (m,r) when m > n · alpha = sqrt(d/r)
//! Weights are bf16 and round stochastically. Here G is formed: the model is small.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, DType, Device, Tensor};

use crate::batch::encode;
use crate::eval;
use crate::export;
use crate::network::{Network, cross_entropy};
use crate::rng::Rng;
use crate::text::{TURN_END, prompt};
use crate::vocabulary::Trained;
use crate::world::{Fact, facts};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-6;
const GROWTH_LIMIT: f64 = 1.01;
/// The limiter's stored norm is at least this share of sqrt(r·max(m,n)).
const GROWTH_FLOOR: f64 = 0.5;
const SEED: u64 = 1;

/// Question, and the answer to be taught.
pub const LESSONS: [(&str, &str); 4] = [
    ("Where does Mira the fox live?", "Mira lives by the blue lake."),
    ("What is your name?", "My name is Apollo."),
    ("What does Toby the bear eat?", "Toby eats fresh bread."),
    ("What is the secret word?", "The secret word is sunflowers."),
];
/// Questions whose answers must stay.
pub const PROBES: [&str; 6] = [
    "What is the capital of Aldoria?",
    "What does Luna the owl like to do?",
    "What is the opposite of hot?",
    "What is 2 plus 3?",
    "Who is the best friend of Max?",
    "Where does Otto the otter live?",
];

/// Exponential moving averages of one parameter.
struct Moments {
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    norm: f64,
    projection: Option<Tensor>,
}

/// APOLLO for matrices, AdamW for vectors.
struct Apollo {
    lr: f64,
    rank: usize,
    step: i32,
    moments: BTreeMap<String, Moments>,
    rng: Rng,
}

impl Apollo {
    fn new(network: &Network, lr: f64, rank: usize) -> Result<Self> {
        let mut rng = Rng::new(SEED);
        let mut moments = BTreeMap::new();
        for (name, var) in &network.vars {
            let (shape, projection) = match *var.dims() {
                [m, n] => {
                    let (d, r) = (m.min(n), rank.min(m.min(n)));
                    let entries: Vec<f32> = (0..r * d).map(|_| (rng.normal() / (r as f64).sqrt()) as f32).collect();
                    let shape = if m > n { vec![m, r] } else { vec![r, n] };
                    (shape, Some(Tensor::from_vec(entries, (r, d), &Device::Cpu)?))
                }
                _ => (var.dims().to_vec(), None),
            };
            let zero = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
            let entry = Moments { exp_avg: zero.clone(), exp_avg_sq: zero, norm: 0.0, projection };
            moments.insert(name.clone(), entry);
        }
        Ok(Self { lr, rank, step: 0, moments, rng })
    }

    fn apply(&mut self, network: &Network, grads: &GradStore) -> Result<()> {
        self.step += 1;
        let lr = self.lr * (1.0 - BETA2.powi(self.step)).sqrt() / (1.0 - BETA1.powi(self.step));
        for (name, var) in &network.vars {
            let grad = grads.get(var).with_context(|| format!("no gradient for {name}"))?;
            let state = self.moments.get_mut(name).context("a state for every parameter")?;
            let update = match &state.projection {
                None => state.normalised(grad)?,
                Some(p) => state.scaled(grad, &p.clone(), self.rank)?,
            };
            let moved = (var.as_tensor() - (update * lr)?)?;
            var.set(&round_stochastically(&moved, &mut self.rng)?)?;
        }
        Ok(())
    }
}

impl Moments {
    /// exp_avg / (sqrt(exp_avg_sq) + eps) after taking `r` in; bias is corrected in the step size.
    fn normalised(&mut self, r: &Tensor) -> Result<Tensor> {
        self.exp_avg = ((&self.exp_avg * BETA1)? + (r * (1.0 - BETA1))?)?;
        self.exp_avg_sq = ((&self.exp_avg_sq * BETA2)? + (r.sqr()? * (1.0 - BETA2))?)?;
        Ok((&self.exp_avg / (self.exp_avg_sq.sqrt()? + EPS)?)?)
    }

    /// G scaled channel by channel, with the limit on the growth of its norm.
    fn scaled(&mut self, grad: &Tensor, p: &Tensor, rank: usize) -> Result<Tensor> {
        let (m, n) = grad.dims2()?;
        let r = rank.min(m.min(n));
        let tall = m > n;
        let compact = if tall { grad.matmul(&p.t()?)? } else { p.matmul(grad)? };
        let normed = self.normalised(&compact)?;
        let norms = |x: &Tensor| x.sqr()?.sum_keepdim(if tall { D::Minus1 } else { D::Minus2 })?.sqrt();
        let s = (norms(&normed)? / (norms(&compact)? + 1e-8)?)?;
        let update = grad.broadcast_mul(&s)?;
        let norm = f64::from(update.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
        let floor = GROWTH_FLOOR * ((r * m.max(n)) as f64).sqrt();
        let limit = if self.norm > 0.0 { (norm / (self.norm + 1e-8)).max(GROWTH_LIMIT) / GROWTH_LIMIT } else { 1.0 };
        self.norm = (norm / limit).max(floor);
        Ok((update * ((m.min(n) as f64 / r as f64).sqrt() / limit))?)
    }
}

/// f32 values to one of the two nearest bf16 values, the nearer one more often.
fn round_stochastically(x: &Tensor, rng: &mut Rng) -> Result<Tensor> {
    let values: Vec<f32> = x.flatten_all()?.to_vec1()?;
    let rounded: Vec<f32> = values
        .iter()
        .map(|v| f32::from_bits(v.to_bits().wrapping_add((rng.bits() & 0xFFFF) as u32) & 0xFFFF_0000))
        .collect();
    Ok(Tensor::from_vec(rounded, x.dims(), &Device::Cpu)?)
}

/// Mean loss of `answer` and its end of turn, the context frozen.
fn frozen_loss(network: &Network, tokenizer: &Trained, question: &str, answer: &str) -> Result<Tensor> {
    let context = encode(tokenizer, &prompt(question))?;
    let decision = encode(tokenizer, &format!("{answer}{TURN_END}"))?;
    let (last, before) = context.split_last().context("an empty context")?;
    let row = |ids: &[u32]| Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu);
    let (_, past) = network.hidden(&row(before)?, None)?;
    let past: Vec<_> = past.into_iter().map(|(k, v)| (k.detach(), v.detach())).collect();
    let window = [&[*last], &decision[..decision.len() - 1]].concat();
    let (hidden, _) = network.hidden(&row(&window)?, Some(&past))?;
    cross_entropy(&network.logits(&hidden)?, &Tensor::from_slice(&decision, decision.len(), &Device::Cpu)?)
}

/// What one lesson did.
struct Outcome {
    first_loss: f64,
    last_loss: f64,
    answer: String,
    learned_at: Option<usize>,
    probes_kept: usize,
    others_kept: f64,
    also_changed: Vec<String>,
    phrasings_moved: f64,
}

fn teach(model: &Path, world: &[Fact], lesson: (&str, &str), lr: f64, steps: usize) -> Result<Outcome> {
    let (network, tokenizer) = export::read(model)?;
    let say = |q: &str| eval::answer(&network, &tokenizer, q);
    let before: Vec<String> = PROBES.iter().map(|q| say(q)).collect::<Result<_>>()?;
    let mut optimizer = Apollo::new(&network, lr, 256)?;
    let (mut first_loss, mut last_loss, mut learned_at) = (0.0, 0.0, None);
    for step in 1..=steps {
        let loss = frozen_loss(&network, &tokenizer, lesson.0, lesson.1)?;
        last_loss = f64::from(loss.to_scalar::<f32>()?);
        if step == 1 {
            first_loss = last_loss;
        }
        optimizer.apply(&network, &loss.backward()?)?;
        if learned_at.is_none() && say(lesson.0)? == lesson.1 {
            learned_at = Some(step);
        }
    }
    let probes_kept = PROBES.iter().zip(&before).filter(|(q, b)| say(q).is_ok_and(|a| a == **b)).count();
    let mut taught: Fact = world
        .iter()
        .find(|f| f.asked.iter().any(|q| q == lesson.0))
        .cloned()
        .with_context(|| format!("no fact is asked for by {:?}", lesson.0))?;
    let mut others = eval::exact(&network, &tokenizer, world, |f| &f.asked[..1])?;
    others.wrong.retain(|q| q != &taught.asked[0]);
    taught.answer = lesson.1.to_string();
    let phrasings_moved = eval::exact(&network, &tokenizer, &[taught], |f| &f.asked)?.share();
    Ok(Outcome {
        first_loss,
        last_loss,
        answer: say(lesson.0)?,
        learned_at,
        probes_kept,
        others_kept: others.share(),
        also_changed: others.wrong,
        phrasings_moved,
    })
}

/// Prints every lesson at several learning rates and lengths. "All facts" are the plain questions
/// of the world with their old answers, the taught one included; "its phrasings" are the share of
/// the taught fact's other questions that now get the new answer.
pub fn run(model: &Path) -> Result<()> {
    let (network, tokenizer) = export::read(model)?;
    println!("seed {SEED}; answers before:");
    for question in LESSONS.iter().map(|(q, _)| q).chain(&PROBES) {
        println!("  {question}  ->  {}", eval::answer(&network, &tokenizer, question)?);
    }
    let world = facts();
    println!("lr      steps  loss first -> last  learned at  probes  all facts  its phrasings  answer after");
    for lesson in LESSONS {
        for (lr, steps) in [(1e-4, 10), (1e-4, 20), (2e-4, 10), (2e-4, 20), (5e-4, 10), (1e-3, 10)] {
            let o = teach(model, &world, lesson, lr, steps)?;
            println!(
                "{lr:.0e}    {steps:4}   {:7.3} -> {:.4}   {:>8}    {}/{}   {:5.1}%         {:5.1}%   {}",
                o.first_loss,
                o.last_loss,
                o.learned_at.map_or("-".to_string(), |s| s.to_string()),
                o.probes_kept,
                PROBES.len(),
                100.0 * o.others_kept,
                100.0 * o.phrasings_moved,
                o.answer
            );
            if !o.also_changed.is_empty() {
                println!("        also changed: {}", o.also_changed.join(" "));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stochastic_rounding_is_bf16_and_unbiased() {
        let (value, count) = (1.003_f32, 40_000);
        let x = Tensor::full(value, count, &Device::Cpu).expect("values");
        let rounded: Vec<f32> =
            round_stochastically(&x, &mut Rng::new(2)).and_then(|t| Ok(t.to_vec1()?)).expect("rounds");
        assert!(rounded.iter().all(|v| v.to_bits() & 0xFFFF == 0));
        let mean = rounded.iter().map(|v| f64::from(*v)).sum::<f64>() / count as f64;
        // The step of bf16 at 1 is 2^-7, so the deviation of the mean is below 2^-8 / sqrt(count) = 2e-5.
        assert!((mean - f64::from(value)).abs() < 1e-4, "{mean}");
    }
}
