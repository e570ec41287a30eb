//! Replays the training of one matrix: `replay IN.safetensors OUT.safetensors`.
//!
//! IN holds `w` (m,n), `x.t` (T,n) and `dy.t` (T,m) for t = 0, 1, ..., and `p.k` (r, min(m,n)) for
//! the k-th projection, all f32, and the constants in its metadata, as strings. OUT holds `w.t`, the
//! weight after step t. To compare the optimizer with another implementation, step by step.

use anyhow::{Context, Result, bail, ensure};
use apollo::{Convention, Gates, Optimizer, Outcome, Rule, ScaleType, Settings, Tensor, TensorKind};
use compute::{Cpu, Device, Dtype, Sink, cpu::Weight};
use safetensors::{SafeTensors, tensor::TensorView};
use std::collections::HashMap;
use std::sync::Arc;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [input, output] = &args[..] else { bail!("usage: replay IN.safetensors OUT.safetensors") };
    let bytes = std::fs::read(input).with_context(|| format!("cannot read {input}"))?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| format!("{input} is not a safetensors file"))?;
    let (_, header) = SafeTensors::read_metadata(&bytes)?;
    let settings = settings(header.metadata().as_ref().context("no metadata in the file")?)?;
    let weights = replay(&file, settings)?;
    let (m, n) = matrix(&file, "w").map(|(m, n, _)| (m, n))?;
    let raw: Vec<Vec<u8>> = weights.iter().map(|w| w.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let mut views = HashMap::new();
    for (t, bytes) in raw.iter().enumerate() {
        views.insert(format!("w.{t}"), TensorView::new(safetensors::Dtype::F32, vec![m, n], bytes)?);
    }
    safetensors::serialize_to_file(views, None, output.as_ref())?;
    println!("{} steps of ({m},{n}) written to {output}", weights.len());
    Ok(())
}

/// The weight after each step.
pub fn replay(file: &SafeTensors, settings: Settings) -> Result<Vec<Vec<f32>>> {
    let (m, n, w) = matrix(file, "w")?;
    let rank = settings.rank.min(m).min(n);
    let mut projections = Vec::new();
    while let Ok((r, d, p)) = matrix(file, &format!("p.{}", projections.len())) {
        ensure!((r, d) == (rank, m.min(n)), "p.{} is ({r},{d}), not ({rank},{})", projections.len(), m.min(n));
        projections.push(p);
    }
    let steps = (0..).take_while(|t| file.tensor(&format!("x.{t}")).is_ok()).count() as u64;
    let needed = steps.div_ceil(settings.update_proj_gap.max(1));
    ensure!(projections.len() as u64 >= needed, "{needed} projections needed, {} in the file", projections.len());

    let device = Arc::new(Cpu::new(0)?);
    let tensor = Tensor { name: "w".into(), rows: m, cols: n, kind: TensorKind::Matrix, rule: Rule::Apollo };
    let mut optimizer = Optimizer::new(device.clone(), vec![tensor], settings)
        .with_projections(Box::new(move |refresh, _, _| projections[refresh as usize].clone()));
    let weights = [Weight::from_values(Dtype::F32, m, n, &w)];
    let mut after = Vec::new();
    for t in 0..steps {
        let (rows, x_cols, x) = matrix(file, &format!("x.{t}"))?;
        let (dy_rows, dy_cols, dy) = matrix(file, &format!("dy.{t}"))?;
        ensure!((dy_rows, dy_cols, x_cols) == (rows, m, n), "x.{t} and dy.{t} do not belong to w ({m},{n})");
        let mut gradients = optimizer.gradients();
        gradients.linear(0, &Arc::new(x.into()), &Arc::new(dy.into()), rows);
        match device.run(|| optimizer.step(&weights, &gradients, 0.0, 1.0, &Gates::default())) {
            Outcome::Applied(_) => after.push(weights[0].values()),
            Outcome::Skipped(why) => bail!("step {t} was skipped: {why}"),
        }
    }
    Ok(after)
}

/// (rows, cols, values) of an f32 matrix.
pub fn matrix(file: &SafeTensors, name: &str) -> Result<(usize, usize, Vec<f32>)> {
    let view = file.tensor(name).with_context(|| format!("no tensor {name}"))?;
    let &[rows, cols] = view.shape() else { bail!("{name} has shape {:?}, not two dimensions", view.shape()) };
    ensure!(view.dtype() == safetensors::Dtype::F32, "{name} is {:?}, not F32", view.dtype());
    let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Ok((rows, cols, values))
}

/// The constants in the metadata.
pub fn settings(metadata: &HashMap<String, String>) -> Result<Settings> {
    let text = |key: &str| metadata.get(key).with_context(|| format!("no {key} in the metadata")).map(String::as_str);
    let float = |key: &str| -> Result<f32> { text(key)?.parse().with_context(|| format!("{key} is not a number")) };
    let whole =
        |key: &str| -> Result<u64> { text(key)?.parse().with_context(|| format!("{key} is not a whole number")) };
    Ok(Settings {
        lr: float("lr")?,
        rank: whole("rank")? as usize,
        scale: float("scale")?,
        scale_type: match text("scale_type")? {
            "channel" => ScaleType::Channel,
            "tensor" => ScaleType::Tensor,
            other => bail!("scale_type {other} is neither channel nor tensor"),
        },
        convention: match text("convention")? {
            "paper" => Convention::Paper,
            "apollo-torch" => Convention::ApolloTorch,
            other => bail!("convention {other} is neither paper nor apollo-torch"),
        },
        beta1: float("beta1")?,
        beta2: float("beta2")?,
        eps: float("eps")?,
        weight_decay: float("weight_decay")?,
        update_proj_gap: whole("update_proj_gap")?,
        norm_growth_limit: match text("norm_growth_limit")? {
            "off" => None,
            _ => Some(float("norm_growth_limit")?),
        },
        norm_growth_floor: float("norm_growth_floor")?,
        ..Settings::default()
    })
}
