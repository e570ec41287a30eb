//! Rotary position embedding and its scalings, as transformers computes them.
//!
//! d elements of a head that rotate · f_i = theta^(-2i/d), i < d/2, inverse frequencies · angle of position p: p·f_i.
//! default: f · linear: f/factor · llama3: low frequencies divided, a smooth band between ·
//! yarn (arXiv:2309.00071): blend of f and f/factor over a band, and a factor on cos and sin.

use crate::config::{ConfigError, Keys};
use serde_json::Value;
use std::f64::consts::TAU;

/// How the frequencies were scaled for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// Not at all.
    Default,
    /// All of them divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The low ones divided, with a smooth band between.
    Llama3,
    /// A blend of f and f/factor over a band.
    Yarn {
        /// The factor.
        factor: f64,
        /// Positions that the model was trained with before.
        original: f64,
        /// Whether band and attention factor are those of the paper.
        plain: bool,
    },
}

/// Rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies before any scaling, `rope_theta`.
    pub theta: f64,
    /// How they were scaled.
    pub scaling: Scaling,
    /// Inverse frequencies, d/2.
    pub frequencies: Vec<f32>,
    /// Factor on cos and sin, 1 except for yarn.
    pub attention_factor: f32,
}

impl Rope {
    /// From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (4). Where both stand,
    /// `rope_scaling` counts, and `original_max_position_embeddings` beside them counts before one
    /// inside: as transformers 5.23 reads them.
    /// `rotated` elements of a head are paired.
    pub(crate) fn parse(keys: &Keys, rotated: usize, max_positions: usize) -> Result<Rope, ConfigError> {
        let scaling = keys.object("rope_scaling", "rope_scaling.")?.filter(|p| !p.map.is_empty());
        let parameters = match scaling {
            Some(scaling) => Some(scaling),
            None => keys.object("rope_parameters", "rope_parameters.")?,
        };
        let original = |p: &Keys| match keys.get("original_max_position_embeddings") {
            Some(_) => keys.size("original_max_position_embeddings"),
            None => p.size_or("original_max_position_embeddings", max_positions),
        };
        let theta = match &parameters {
            Some(p) if p.get("rope_theta").is_some() => p.float("rope_theta")?,
            _ => keys.float_or("rope_theta", 10000.0)?,
        };
        let base: Vec<f64> = (0..rotated / 2).map(|i| theta.powf(-2.0 * i as f64 / rotated as f64)).collect();
        let Some(p) = parameters else { return Ok(Rope::new(theta, Scaling::Default, base, 1.0)) };
        let kind = p.get("rope_type").or(p.get("type")).cloned().unwrap_or(Value::from("default"));
        match kind.as_str() {
            Some("default") => Ok(Rope::new(theta, Scaling::Default, base, 1.0)),
            Some("linear") => {
                let factor = p.float("factor")?;
                let scaled = base.iter().map(|f| f / factor).collect();
                Ok(Rope::new(theta, Scaling::Linear { factor }, scaled, 1.0))
            }
            Some("llama3") => llama3(base, &p, theta, original(&p)? as f64),
            Some("yarn") => yarn(base, &p, theta, max_positions as f64, original(&p)? as f64),
            _ => Err(ConfigError::Unsupported {
                key: format!("{}rope_type", p.prefix),
                found: kind.to_string(),
                supported: "default, linear, llama3, yarn",
            }),
        }
    }

    fn new(theta: f64, scaling: Scaling, frequencies: Vec<f64>, attention_factor: f64) -> Rope {
        let frequencies = frequencies.iter().map(|f| *f as f32).collect();
        Rope { theta, scaling, frequencies, attention_factor: attention_factor as f32 }
    }

    /// Rows first..first + n of the table (position, d): cos of each frequency, then sin, both
    /// times the attention factor. The angle is an f32 product as in the reference.
    pub fn table(&self, first: usize, n: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(n * 2 * self.frequencies.len());
        for position in first..first + n {
            let angles = self.frequencies.iter().map(|f| (position as f32 * f) as f64);
            table.extend(angles.clone().map(|a| a.cos() as f32 * self.attention_factor));
            table.extend(angles.map(|a| a.sin() as f32 * self.attention_factor));
        }
        table
    }
}

fn llama3(base: Vec<f64>, p: &Keys, theta: f64, original: f64) -> Result<Rope, ConfigError> {
    let (factor, low, high) = (p.float("factor")?, p.float("low_freq_factor")?, p.float("high_freq_factor")?);
    let scaled = base.into_iter().map(|f| {
        let turns = original * f / TAU;
        if turns < low {
            f / factor
        } else if turns > high {
            f
        } else {
            let smooth = (turns - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    });
    Ok(Rope::new(theta, Scaling::Llama3, scaled.collect(), 1.0))
}

fn yarn(base: Vec<f64>, p: &Keys, theta: f64, max_positions: f64, original: f64) -> Result<Rope, ConfigError> {
    let factor = p.float_or("factor", max_positions / original)?;
    let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
    let attention_factor = match (p.get("attention_factor"), p.get("mscale"), p.get("mscale_all_dim")) {
        (Some(_), _, _) => p.float("attention_factor")?,
        (None, Some(_), Some(_)) => mscale(factor, p.float("mscale")?) / mscale(factor, p.float("mscale_all_dim")?),
        _ => mscale(factor, 1.0),
    };
    // The dimension whose frequency turns `rotations` times over the original context.
    let d = 2.0 * base.len() as f64;
    let dimension = |rotations: f64| d * (original / (rotations * TAU)).ln() / (2.0 * theta.ln());
    let (mut low, mut high) = (dimension(p.float_or("beta_fast", 32.0)?), dimension(p.float_or("beta_slow", 1.0)?));
    if p.get("truncate").and_then(Value::as_bool).unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(d - 1.0));
    if low == high {
        high += 0.001;
    }
    let blended = base.into_iter().enumerate().map(|(i, f)| {
        let interpolate = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        interpolate * f / factor + (1.0 - interpolate) * f
    });
    const OWN: [&str; 6] = ["attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "truncate"];
    let plain = OWN.iter().all(|key| p.get(key).is_none());
    Ok(Rope::new(theta, Scaling::Yarn { factor, original, plain }, blended.collect(), attention_factor))
}
