//! Times syncs of one bf16 matrix: `cargo run --release -p checkpoint --example measure -- DIR [MiB]`.
//!
//! Weights are drawn near normal with standard deviation 0.02 and moved by a step of 3e-5 with stochastic
//! rounding, as a trained matrix is after a few steps. DIR must not exist; it is left for a look.

use std::io::Write;
use std::path::Path;

use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Progress};

struct Matrix {
    tensors: Vec<LiveTensor>,
    bytes: Vec<u8>,
}

impl LiveWeights for Matrix {
    fn tensors(&self) -> &[LiveTensor] {
        &self.tensors
    }

    fn read(&self, _: usize, offset: u64, buf: &mut [u8]) {
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes[at..at + buf.len()]);
    }
}

/// xorshift64*, seed 1.
struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Near normal with standard deviation 1: the sum of twelve uniform numbers.
    fn normal(&mut self) -> f32 {
        let mut bits = (self.bits(), self.bits());
        let mut sum = 0.0;
        for _ in 0..6 {
            sum += ((bits.0 & 1023) + (bits.1 & 1023)) as f32 / 1023.0;
            bits = (bits.0 >> 10, bits.1 >> 10);
        }
        sum - 6.0
    }

    fn round(&mut self, value: f32) -> [u8; 2] {
        let bits = value.to_bits().wrapping_add(self.bits() as u32 & 0xffff);
        ((bits >> 16) as u16).to_le_bytes()
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("usage: measure DIR [MiB]")?;
    let mib: usize = args.next().map_or(Ok(256), |mib| mib.parse())?;
    let (dir, shape) = (Path::new(&dir), [mib * 512, 1024]);
    let mut rng = Rng(1);
    let bytes: Vec<u8> = (0..shape[0] * shape[1])
        .flat_map(|_| {
            let value = rng.normal() * 0.02;
            rng.round(value)
        })
        .collect();
    let n = bytes.len();
    std::fs::create_dir(dir)?;
    let mut file = std::fs::File::create(dir.join("model.safetensors"))?;
    let mut header = format!("{{\"w\":{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[0,{n}]}}}}");
    header.push_str(&" ".repeat((8 - header.len() % 8) % 8));
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    file.write_all(&bytes)?;
    let tensor = LiveTensor { name: "w".into(), dtype: "BF16".into(), shape: shape.to_vec(), bytes: n as u64 };
    let mut live = Matrix { tensors: vec![tensor], bytes };
    let began = std::time::Instant::now();
    let (mut checkpoint, recovery) = Checkpoint::open(dir)?;
    println!("{recovery}, {:.2} s", began.elapsed().as_secs_f64());
    for step in 1..=2 {
        for element in live.bytes.chunks_exact_mut(2) {
            let value = f32::from_bits(u32::from(u16::from_le_bytes([element[0], element[1]])) << 16);
            let moved = value + rng.normal() * 3e-5;
            element.copy_from_slice(&rng.round(moved));
        }
        let progress = Progress { step, ..Progress::default() };
        let mut journalled = 0.0;
        let began = std::time::Instant::now();
        let report = checkpoint.sync(&live, &mut |_| Ok(()), progress, &mut |done, total| {
            if done * 2 <= total {
                journalled = began.elapsed().as_secs_f64();
            }
        })?;
        let ratio = report.bytes_journal as f64 / n as f64;
        println!("{report}; ratio {ratio:.4}, journal {journalled:.2} s");
    }
    println!("{}", checkpoint.verify()?);
    println!("back: {}", checkpoint.rollback(0)?);
    Ok(())
}
