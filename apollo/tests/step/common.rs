//! A small model with one tensor of every kind, and random gradients for it.

use apollo::{Gates, Gradients, Optimizer, Outcome, Rule, Settings, Tensor, TensorKind};
use compute::cpu::Buffer;
use compute::{Cpu, Device, Dtype, Sink, Stream, cpu::Weight};
use std::sync::Arc;

/// SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014).
pub struct Random(u64);

impl Random {
    /// For one test: TEST_SEED or a fixed seed, printed.
    pub fn new(test: &str) -> Random {
        let seed = std::env::var("TEST_SEED").map_or(20_260_729, |s| s.parse().expect("TEST_SEED is a number"));
        println!("{test}: TEST_SEED={seed}");
        Random(test.bytes().fold(seed, |s, b| s.wrapping_mul(257).wrapping_add(b as u64)))
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// Roughly normal with variance 1.
    pub fn normal(&mut self) -> f32 {
        ((0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0) as f32
    }
    pub fn normals(&mut self, n: usize) -> Buffer {
        (0..n).map(|_| self.normal()).collect::<Vec<_>>().into()
    }
}

pub fn tensor(name: &str, rows: usize, cols: usize, kind: TensorKind, rule: Rule) -> Tensor {
    Tensor { name: name.into(), rows, cols, kind, rule }
}

/// Numbers of the tensors of [`tensors`].
pub const TALL: usize = 0;
pub const WIDE: usize = 1;
pub const NORM: usize = 2;
pub const HEAD: usize = 3;
pub const EMBED: usize = 4;
pub const TIED: usize = 5;
pub const FROZEN: usize = 6;

/// One tensor of every kind and rule.
pub fn tensors() -> Vec<Tensor> {
    vec![
        tensor("tall", 80, 24, TensorKind::Matrix, Rule::Apollo),
        tensor("wide", 24, 80, TensorKind::Matrix, Rule::Apollo),
        tensor("norm", 1, 24, TensorKind::Vector, Rule::Apollo),
        tensor("head", 30, 24, TensorKind::Matrix, Rule::AdamW),
        tensor("embed", 30, 24, TensorKind::Lookup, Rule::AdamW),
        tensor("tied", 30, 24, TensorKind::Matrix, Rule::Apollo),
        tensor("frozen", 5, 24, TensorKind::Matrix, Rule::Frozen),
    ]
}

/// lr large enough that f32 weights of size 1 show every step well.
pub fn settings() -> Settings {
    Settings { lr: 1e-2, rank: 4, update_proj_gap: 3, seed: 7, ..Settings::default() }
}

/// An optimizer with the weights that it trains.
pub struct Rig {
    pub device: Arc<Cpu>,
    pub optimizer: Optimizer<Cpu>,
    pub weights: Vec<Weight>,
}

impl Rig {
    /// Weights of size 1, the same every time.
    pub fn new(tensors: Vec<Tensor>, settings: Settings, dtype: Dtype) -> Rig {
        let device = Arc::new(Cpu::new(1).expect("a thread"));
        let weights = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| Weight::from_values(dtype, t.rows, t.cols, &Random(i as u64).normals(t.rows * t.cols)))
            .collect();
        Rig { optimizer: Optimizer::new(device.clone(), tensors, settings), device, weights }
    }

    pub fn step(&mut self, gradients: &Gradients<Cpu>) -> Outcome {
        self.step_with(gradients, 1.0, 1.0, &Gates::default())
    }

    pub fn step_with(&mut self, gradients: &Gradients<Cpu>, loss: f32, lr_scale: f32, gates: &Gates) -> Outcome {
        let (optimizer, weights) = (&mut self.optimizer, &self.weights);
        self.device.run(|| optimizer.step(weights, gradients, loss, lr_scale, gates))
    }

    /// A step that must be applied; how far each weight moved in total.
    #[track_caller]
    pub fn apply(&mut self, gradients: &Gradients<Cpu>) -> Vec<f64> {
        let before = self.values();
        let outcome = self.step(gradients);
        assert!(matches!(outcome, Outcome::Applied(_)), "{outcome:?}");
        self.values().iter().zip(&before).map(|(a, b)| distance(a, b)).collect()
    }

    pub fn values(&self) -> Vec<Vec<f32>> {
        self.weights.iter().map(Weight::values).collect()
    }

    pub fn saved(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.optimizer.save(&mut bytes).expect("a vector takes everything");
        bytes
    }

    /// All weights as bits, and the saved state.
    pub fn snapshot(&self) -> (Vec<Vec<u32>>, Vec<u8>) {
        (self.values().iter().map(|w| w.iter().map(|v| v.to_bits()).collect()).collect(), self.saved())
    }

    /// Replaces a weight's values.
    pub fn set(&self, tensor: usize, values: &[f32]) {
        let w = &self.weights[tensor];
        for (row, line) in values.chunks(w.cols()).enumerate() {
            w.write(row, 0, line, &Stream::rounding(0, 0, 0));
        }
    }

    /// Random gradients of every tensor, t rows each.
    pub fn gradients(&self, r: &mut Random, t: usize) -> Gradients<Cpu> {
        let mut g = self.optimizer.gradients();
        for (i, tensor) in self.optimizer.tensors().iter().enumerate() {
            if !g.wants(i) {
                continue;
            }
            let (m, n) = (tensor.rows, tensor.cols);
            let ids: Vec<u32> = (0..t).map(|_| r.below(m) as u32).collect();
            match tensor.kind {
                TensorKind::Vector => g.dense(i, &Arc::new(r.normals(n))),
                TensorKind::Lookup => g.rows(i, &ids, &Arc::new(r.normals(t * n))),
                TensorKind::Matrix => {
                    g.linear(i, &Arc::new(r.normals(t * n)), &Arc::new(r.normals(t * m)), t);
                    if i == TIED {
                        g.rows(i, &ids, &Arc::new(r.normals(t * n)));
                    }
                }
            }
        }
        g
    }
}

/// A model of one matrix, f32.
pub fn one_matrix(m: usize, n: usize, settings: Settings) -> Rig {
    Rig::new(vec![tensor("w", m, n, TensorKind::Matrix, Rule::Apollo)], settings, Dtype::F32)
}

/// The gradient dyᵀx of tensor 0.
pub fn linear(rig: &Rig, x: impl Into<Buffer>, dy: impl Into<Buffer>, t: usize) -> Gradients<Cpu> {
    let mut g = rig.optimizer.gradients();
    g.linear(0, &Arc::new(x.into()), &Arc::new(dy.into()), t);
    g
}

pub fn distance(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| (a as f64 - b as f64).powi(2)).sum::<f64>().sqrt()
}

/// The JSON header of a saved state.
pub fn header(state: &[u8]) -> serde_json::Value {
    let length = u64::from_le_bytes(state[8..16].try_into().expect("eight bytes")) as usize;
    serde_json::from_slice(&state[16..16 + length]).expect("a header")
}

/// The norm that the limiter remembers of a tensor.
pub fn stored_norm(rig: &Rig, tensor: usize) -> f32 {
    f32::from_bits(header(&rig.saved())["tensors"][tensor]["norm_bits"].as_u64().expect("bits") as u32)
}
