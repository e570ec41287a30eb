//! Makes the model that apollod carries in its binary.
//!
//! Why it exists: the demo must show a real trained model whose answer changes, on a machine with
//! no network and no GPU, and no model of 4 MB has a licence and a vocabulary that suit. So this
//! crate invents a small world, writes questions and answers about it, trains a tokenizer and a
//! Qwen3-shaped model of 1.3 M parameters on them with candle, and writes a model directory that
//! transformers, vLLM and apollod all load.
//!
//! text: world -> phrasings -> text -> batch · model: vocabulary, network, train · proof: eval, teach

mod batch;
mod eval;
mod export;
mod network;
mod phrasings;
mod plot;
mod report;
mod rng;
mod teach;
mod text;
mod train;
mod vocabulary;
mod world;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use network::Shape;
use text::Writer;
use train::Recipe;

const USAGE: &str = "usage: demo_model train [STEPS] | eval | ask QUESTION... | teach\n\
    run it in research/demo_model; the model is in ./model";
const SEED: u64 = 20261120;
/// Optimizer steps of the model that is kept.
const STEPS: usize = 1600;
/// Documents that the tokenizer is trained on.
const TOKENIZER_DOCUMENTS: usize = 20_000;
const VOCAB_SIZE: usize = 1280;

fn recipe(steps: usize) -> Recipe {
    let shape = Shape {
        vocab_size: VOCAB_SIZE,
        hidden_size: 160,
        intermediate_size: 448,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
    };
    Recipe { shape, steps, warmup: 100, lr: 3e-3, lr_end: 3e-5, rows: 24, length: 128, seed: SEED, log_every: 20 }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let model = PathBuf::from("model");
    match args.first().map(String::as_str) {
        Some("train") => train_and_write(args.get(1).map_or(Ok(STEPS), |s| s.parse())?, &model),
        Some("eval") => report::print(&report::measure(&model)?),
        Some("ask") => ask(&model, &args[1..]),
        Some("teach") => teach::run(&model),
        _ => bail!("{USAGE}"),
    }
}

fn train_and_write(steps: usize, model: &Path) -> Result<()> {
    let facts = world::facts();
    let mut writer = Writer::new(&facts, SEED + 2);
    let lines: Vec<String> = (0..TOKENIZER_DOCUMENTS)
        .map(|_| writer.document().into_iter().filter(|p| p.text != "\n").map(|p| p.text).collect::<String>())
        .map(|text| report::without_special_tokens(&text))
        .collect();
    let tokenizer = vocabulary::train(&lines, VOCAB_SIZE)?;
    let recipe = recipe(steps);
    let (network, curve) = train::run(&recipe, &facts, &tokenizer)?;
    export::write(model, &network, &tokenizer)?;
    report::write(Path::new("."), model, &recipe, &curve)
}

fn ask(model: &Path, questions: &[String]) -> Result<()> {
    let (network, tokenizer) = export::read(model)?;
    for question in questions {
        println!("{question}\n    {}", eval::answer(&network, &tokenizer, question)?);
    }
    Ok(())
}
