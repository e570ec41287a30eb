//! `apollod bench scan`: how fast a GPU finds out which blocks of its weights have changed.

use super::round;
use anyhow::{Context, Result, bail, ensure};
use compute::cuda::Weight;
use compute::hash::Keys;
use compute::{Cuda, Dtype};
use serde_json::json;
use std::sync::Arc;

use crate::backend::DeviceChoice;

/// Bytes of a block, as a sync counts them.
const BLOCK_BYTES: usize = 4096;
/// Elements of a row of the weight that is hashed.
const COLUMNS: usize = 4096;
/// Passes that count, after one that does not.
const PASSES: usize = 5;

/// Hashes so many bytes of bf16 weights and prints the median of some passes.
pub fn scan(device: &DeviceChoice, bytes: usize, json: bool) -> Result<()> {
    let DeviceChoice::Cuda(name) = device else {
        bail!("weights in the machine's memory are compared with the files, not hashed: use --device cuda");
    };
    let rows = bytes / (2 * COLUMNS);
    ensure!(rows > 0, "--bytes {bytes}: want {} at least", 2 * COLUMNS);
    let cuda = Arc::new(Cuda::open(name)?);
    let weight = Weight::zeros(&cuda, Dtype::BF16, rows, COLUMNS);
    let keys = Keys::new(1);
    let mut passes: Vec<f64> = (0..=PASSES).map(|_| cuda.scan_ms(&[&weight], BLOCK_BYTES, &keys)).skip(1).collect();
    passes.sort_by(f64::total_cmp);
    let (least, most) = (passes[0], *passes.last().context("passes")?);
    let median = passes[PASSES / 2];
    if json {
        let spread = [round(least), round(most)];
        println!(
            "{}",
            json!({"bytes": weight.bytes(), "scan_ms": round(median), "spread": spread, "device": cuda.name()})
        );
    } else {
        let rate = weight.bytes() as f64 / median / 1e6;
        println!(
            "{:.1} GB on {}: {median:.3} ms ({least:.3} - {most:.3}), {rate:.0} GB/s",
            weight.bytes() as f64 / 1e9,
            cuda.name()
        );
    }
    Ok(())
}
