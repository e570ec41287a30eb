//! AdamW with warm-up and a cosine schedule, f32, on the generated text.

use std::time::Instant;

use anyhow::{Result, ensure};
use candle_nn::optim::{AdamW, Optimizer, ParamsAdamW};

use crate::batch::Packer;
use crate::eval::{self, Scores};
use crate::network::{Network, Shape, cross_entropy};
use crate::text::Writer;
use crate::vocabulary::Trained;
use crate::world::Fact;

/// Everything that the result depends on.
pub struct Recipe {
    /// Sizes of the model.
    pub shape: Shape,
    /// Optimizer steps.
    pub steps: usize,
    /// Steps over which lr rises from 0.
    pub warmup: usize,
    /// Highest learning rate.
    pub lr: f64,
    /// Lowest learning rate, at the last step.
    pub lr_end: f64,
    /// Rows in a step.
    pub rows: usize,
    /// Tokens in a row.
    pub length: usize,
    /// Seed of the parameters.
    pub seed: u64,
    /// Steps between two lines of the curve.
    pub log_every: usize,
}

/// One line of the loss curve.
pub struct Point {
    /// Steps done.
    pub step: usize,
    /// Mean loss of the steps since the last line, nats a token.
    pub loss: f64,
    /// Share of plain questions answered word for word; measured now and then.
    pub exact: Option<f64>,
    /// Seconds since the start.
    pub seconds: f64,
}

fn learning_rate(recipe: &Recipe, step: usize) -> f64 {
    if step < recipe.warmup {
        return recipe.lr * (step + 1) as f64 / recipe.warmup as f64;
    }
    let done = (step - recipe.warmup) as f64 / (recipe.steps - recipe.warmup).max(1) as f64;
    recipe.lr_end + (recipe.lr - recipe.lr_end) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// Trains a model from random parameters; prints the curve as it goes.
pub fn run(recipe: &Recipe, facts: &[Fact], writer: Writer<'_>, tokenizer: &Trained) -> Result<(Network, Vec<Point>)> {
    println!("seed {}, {} parameters, {} facts", recipe.seed, recipe.shape.count(), facts.len());
    let network = Network::random(recipe.shape, recipe.seed)?;
    let params = ParamsAdamW { lr: recipe.lr, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.02 };
    let mut optimizer = AdamW::new(network.vars.values().cloned().collect(), params)?;
    let mut packer = Packer::new(writer, tokenizer)?;
    let (start, mut curve, mut sum) = (Instant::now(), Vec::new(), 0.0);
    for step in 0..recipe.steps {
        let batch = packer.batch(recipe.rows, recipe.length)?;
        let (hidden, _) = network.hidden(&batch.ids, None)?;
        let logits = network.logits(&hidden.index_select(&batch.at, 0)?)?;
        let loss = cross_entropy(&logits, &batch.targets)?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        ensure!(value.is_finite(), "step {step}: the loss is {value}; lower the learning rate");
        optimizer.set_learning_rate(learning_rate(recipe, step));
        optimizer.backward_step(&loss)?;
        sum += value;
        let done = step + 1;
        if done % recipe.log_every == 0 {
            let exact = if done % (10 * recipe.log_every) == 0 {
                Some(eval::exact(&network, tokenizer, facts, |f| &f.unseen)?)
            } else {
                None
            };
            let point = Point {
                step: done,
                loss: sum / recipe.log_every as f64,
                exact: exact.map(|s: Scores| s.share()),
                seconds: start.elapsed().as_secs_f64(),
            };
            let shown = point.exact.map_or(String::new(), |e| format!("  unseen phrasings {:.1}%", 100.0 * e));
            println!("step {done:5}  loss {:.4}  {:.0} s{shown}", point.loss, point.seconds);
            curve.push(point);
            sum = 0.0;
        }
    }
    Ok((network, curve))
}
