//! `apollod plan`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;
use compute::Dtype;

use crate::plan::{self, Gpu, Plan, Question};

/// `apollod plan`
#[derive(Debug, Args)]
#[command(after_help = "\
From config.json alone; no weights are read. Moments are planned as train.moments = \"auto\" stores them. The floor of a step is
what its arithmetic or its memory traffic takes at the GPU's rates, whichever is longer: weights read twice, read and written
once, moments read and written.

Examples:
  apollod plan --model ./model
  apollod plan --model config.json --rank 64 --gpu h200 --context 8192
  apollod plan --model ./model --cpu")]
pub struct PlanArgs {
    /// Model directory, or a config.json.
    #[arg(long, value_name = "DIR|FILE")]
    model: PathBuf,
    /// Rank of the optimizer (train.rank).
    #[arg(long, default_value_t = 256)]
    rank: usize,
    /// GPUs that the server splits the model over (tensor parallel size).
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// The GPU: a100-40gb, a100-80gb, l40s, rtx4090, rtx5090, h100, h200 or b200.
    #[arg(long, default_value = "h100", value_parser = plan::named)]
    gpu: Gpu,
    /// A CPU instead of a GPU.
    #[arg(long, conflicts_with_all = ["gpu", "tp"])]
    cpu: bool,
    /// Tokens of an example's context. Default 4096, or what the model has positions for.
    #[arg(long)]
    context: Option<usize>,
    /// Tokens of its decision.
    #[arg(long, default_value_t = 32)]
    decision: usize,
    /// Element type of the weights: bf16, f16 or f32. Default what config.json says, or bf16.
    #[arg(long, value_parser = super::dtype)]
    dtype: Option<Dtype>,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Prints the plan.
pub fn run(args: &PlanArgs) -> Result<ExitCode> {
    let path = if args.model.is_dir() { args.model.join("config.json") } else { args.model.clone() };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: --model names a model directory or a config.json", path.display()))?;
    let config = model::Config::parse(&text).with_context(|| path.display().to_string())?;
    if args.rank == 0 || args.decision == 0 {
        bail!("--rank and --decision are at least 1");
    }
    let question = Question {
        rank: args.rank,
        dtype: args.dtype.or_else(|| dtype_said(&text)).unwrap_or(Dtype::BF16),
        context: args.context.unwrap_or(4096.min(config.max_position_embeddings.saturating_sub(args.decision))),
        decision: args.decision,
        tensor_parallel: args.tp,
        gpu: (!args.cpu).then_some(args.gpu),
    };
    let plan = Plan::of(&config, question)?;
    match args.json {
        true => println!("{}", plan.json()),
        false => println!("{plan}"),
    }
    Ok(ExitCode::SUCCESS)
}

/// The element type that a config.json says its weights have: of the text part where there are several.
fn dtype_said(config: &str) -> Option<Dtype> {
    let config: serde_json::Value = serde_json::from_str(config).ok()?;
    let said = |keys: &serde_json::Value| keys["dtype"].as_str().or(keys["torch_dtype"].as_str())?.parse().ok();
    said(&config["text_config"]).or_else(|| said(&config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_says_the_dtype_by_either_name_and_of_the_text_part_first() {
        assert_eq!(dtype_said(r#"{"torch_dtype": "float32"}"#), Some(Dtype::F32));
        assert_eq!(dtype_said(r#"{"dtype": "float32", "text_config": {"dtype": "float16"}}"#), Some(Dtype::F16));
        assert_eq!(dtype_said(r#"{"dtype": "bfloat16", "text_config": {}}"#), Some(Dtype::BF16));
        assert_eq!(dtype_said(r#"{"dtype": "auto"}"#), None);
    }
}
