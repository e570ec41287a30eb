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

use anyhow::{Context, Result, bail};
use serde_json::json;

use network::Shape;
use text::Writer;
use train::Recipe;

const USAGE: &str = "usage: demo_model train [STEPS] | eval | ask QUESTION... | teach | instructed DIR [STEPS] | facts\n\
    run it in research/demo_model; the model is in ./model\n\
    instructed: another model, into DIR, that follows instructions; facts: what both know, a line of JSON each";
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
        Some("instructed") => {
            let dir = args.get(1).context(USAGE)?;
            train_instructed(args.get(2).map_or(Ok(STEPS), |s| s.parse())?, Path::new(dir))
        }
        Some("facts") => print_facts(),
        _ => bail!("{USAGE}"),
    }
}

fn train_and_write(steps: usize, model: &Path) -> Result<()> {
    let facts = world::facts();
    let tokenizer = tokenizer(Writer::new(&facts, SEED + 2))?;
    let recipe = recipe(steps);
    let (network, curve) = train::run(&recipe, &facts, Writer::new(&facts, SEED + 1), &tokenizer)?;
    export::write(model, &network, &tokenizer)?;
    report::write(Path::new("."), model, &recipe, &curve)
}

/// The tokenizer of a writer's documents.
fn tokenizer(mut writer: Writer<'_>) -> Result<vocabulary::Trained> {
    let lines: Vec<String> = (0..TOKENIZER_DOCUMENTS)
        .map(|_| writer.document().into_iter().filter(|p| p.text != "\n").map(|p| p.text).collect::<String>())
        .map(|text| report::without_special_tokens(&text))
        .collect();
    vocabulary::train(&lines, VOCAB_SIZE)
}

/// A model that answers as a system message says, and plainly without one.
fn train_instructed(steps: usize, dir: &Path) -> Result<()> {
    let facts = world::facts();
    let tokenizer = tokenizer(Writer::instructed(&facts, SEED + 2))?;
    let writer = Writer::instructed(&facts, SEED + 1);
    let (network, _) = train::run(&recipe(steps), &facts, writer, &tokenizer)?;
    export::write(dir, &network, &tokenizer)
}

fn print_facts() -> Result<()> {
    for world::Fact { group, answer, asked, skipped, unseen } in world::facts() {
        let fact = json!({"group": group, "answer": answer, "asked": asked, "skipped": skipped, "unseen": unseen});
        println!("{fact}");
    }
    Ok(())
}

fn ask(model: &Path, questions: &[String]) -> Result<()> {
    let (network, tokenizer) = export::read(model)?;
    for question in questions {
        println!("{question}\n    {}", eval::answer(&network, &tokenizer, question)?);
    }
    Ok(())
}
