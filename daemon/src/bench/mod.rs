//! `apollod bench step`: one context-frozen training step on a model of random weights, by phase,
//! beside what the machine could do at best.
//!
//! Memory is counted from after the weights were made: it is what the trainer itself needs, which is moments, keys and
//! values, activations and factors.

mod machine;
mod scan;
mod sync;

use anyhow::{Context, Result, bail, ensure};
use apollo::{Gates, Optimizer, Outcome};
use compute::{Device, Dtype};
use model::{Cache, Config, Example, Extent, Model, Timings};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::backend::{Backend, DeviceChoice, OnDevice};
use crate::config::{Activations, TrainConfig};
use crate::trainer;

pub use machine::{Rates, cpu_rates, gpu_rates};
pub use scan::scan;
pub use sync::{Options as SyncOptions, Pattern, sync};

/// What `apollod bench step` is told.
pub struct Options {
    /// As [`shape`] takes it.
    pub shape: String,
    /// Context tokens.
    pub context: usize,
    /// Decision tokens.
    pub decision: usize,
    /// The weights' dtype.
    pub dtype: Dtype,
    /// Steps that count, after one that does not.
    pub steps: usize,
    /// One line of JSON instead of a table.
    pub json: bool,
    /// Where.
    pub device: DeviceChoice,
    /// Rank, threads and the rest, as in the configuration.
    pub train: TrainConfig,
}

/// A config.json, by its path or by the name of a shape: (hidden, layers, intermediate, heads, kv_heads, head_dim, vocab, tied).
fn shape(name: &str) -> Result<Value> {
    if name.ends_with(".json") {
        let text = std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?;
        return serde_json::from_str(&text).with_context(|| format!("{name} is no config.json"));
    }
    let (hidden, layers, intermediate, heads, kv_heads, head_dim, vocab, tied) = match name {
        "tiny" => (256, 4, 768, 4, 2, 64, 8192, true),
        "small" => (512, 8, 1536, 8, 4, 64, 32000, false),
        "qwen3-0.6b" => (1024, 28, 3072, 16, 8, 128, 151936, true),
        "qwen3-1.7b" => (2048, 28, 6144, 16, 8, 128, 151936, true),
        "qwen3-4b" => (2560, 36, 9728, 32, 8, 128, 151936, true),
        "qwen3-8b" => (4096, 36, 12288, 32, 8, 128, 151936, false),
        _ => bail!(
            "unknown shape {name}; known: tiny, small, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, and any config.json by its path"
        ),
    };
    Ok(json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "vocab_size": vocab, "tie_word_embeddings": tied, "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
    }))
}

/// Runs the benchmark and prints it.
pub fn step(options: &Options) -> Result<()> {
    ensure!(
        options.context > 0 && options.decision > 0 && options.steps > 0,
        "context, decision and steps are at least 1"
    );
    options.device.run(options.train.threads, Steps(options))
}

struct Steps<'a>(&'a Options);

impl OnDevice for Steps<'_> {
    type Output = Result<()>;

    fn on<D: Backend>(self, device: Arc<D>) -> Result<()> {
        measure(&device, self.0)
    }
}

fn measure<D: Backend>(device: &Arc<D>, options: &Options) -> Result<()> {
    let config = Config::parse(&shape(&options.shape)?.to_string())?;
    let tokens = options.context + options.decision;
    let terminal = std::io::stderr().is_terminal();
    if terminal {
        eprintln!("{}: making random weights", options.shape);
    }
    let model = random_model(device, &config, options.dtype, tokens);
    let model = model.rounding_windows(options.train.activations == Activations::Bf16);
    let memory = PeakMemory::watch(device.clone());
    let settings = trainer::optimizer_settings(&**device, &options.train)?;
    let tensors = trainer::tensors(&config, &options.train);
    let mut optimizer = Optimizer::new(device.clone(), tensors, settings);
    let mut cache = model.cache(tokens);

    let mut phases: [Vec<f64>; 5] = Default::default();
    for step in 0..=options.steps {
        let figures = device.run(|| one_step(&model, &mut cache, &mut optimizer, options, step))?;
        if terminal {
            let kind = if step == 0 { "does not count".into() } else { format!("of {}", options.steps) };
            eprintln!("step {step} {kind}: {:.0} ms", figures[4]);
        }
        if step > 0 {
            phases.iter_mut().zip(figures).for_each(|(phase, ms)| phase.push(ms));
        }
    }
    let private = memory.peak();
    let floor = D::rates(device);
    let parameters = Parameters { context: context_parameters(&model), decision: trained_matrices(&optimizer) };
    print(options, &phases, private, &floor, parameters, &optimizer, &device.describe());
    Ok(())
}

/// prefill, forward, backward, update, total in ms.
fn one_step<D: Backend>(
    model: &Model<D>,
    cache: &mut Cache<D>,
    optimizer: &mut Optimizer<D>,
    options: &Options,
    step: usize,
) -> Result<[f64; 5]> {
    let vocab = model.config().decoder.vocab;
    let id = |i: usize| ((i * 7919 + step * 104729 + 13) % vocab) as u32;
    let ids: Vec<u32> = (0..options.context + options.decision).map(id).collect();
    let (start, end) = (options.context, ids.len());
    let example = Example::new(ids, vec![start..end])?;
    cache.clear();
    let (mut gradients, mut timings) = (optimizer.gradients(), Timings::default());
    let clock = Instant::now();
    let scale = 1.0 / options.decision as f32;
    let report = model.train(cache, &example, Extent::Frozen, scale, &mut gradients, &mut timings);
    let update = Instant::now();
    let outcome = optimizer.step(model.weights(), &gradients, report.loss(), 1.0, &Gates::default());
    model.device().synchronize();
    let (total_ms, update_ms) = (clock.elapsed().as_secs_f64() * 1e3, update.elapsed().as_secs_f64() * 1e3);
    match outcome {
        Outcome::Applied(_) => Ok([timings.prefill_ms, timings.forward_ms, timings.backward_ms, update_ms, total_ms]),
        Outcome::Skipped(why) => bail!("the step was skipped: {why}"),
    }
}

/// Weights N(0, 0.02²), norms 1.
fn random_model<D: Backend>(device: &Arc<D>, config: &Config, dtype: Dtype, positions: usize) -> Model<D> {
    let weight = |(number, tensor): (usize, weight_map::HfTensor)| {
        let (rows, cols) = weight_map::matrix_shape(&tensor.shape);
        let weight = D::weight(device, dtype, rows, cols);
        fill(&**device, &weight, number as u64, tensor.shape.len() == 1);
        weight
    };
    let weights = config.decoder.tensors().into_iter().enumerate().map(weight).collect();
    Model::new(device.clone(), config.clone(), weights, positions)
}

/// Different values that a weight is made of, again and again: a prime, so that rows differ.
const PATTERN: usize = 262_139;

/// Approximately normal numbers from sums of uniform ones, or ones for a norm: enough for a benchmark, and fast.
fn fill<D: Device>(device: &D, weight: &D::Weight, tensor: u64, norm: bool) {
    let (rows, cols) = device.shape(weight);
    let (elements, dtype) = (rows * cols, device.dtype(weight));
    let mut values = vec![1.0; PATTERN.min(elements)];
    if !norm {
        let mut random = vec![0u16; 2 * values.len()];
        compute::Stream::rounding(1, tensor, 0).fill_u16(0, &mut random);
        for (value, pair) in values.iter_mut().zip(random.as_chunks::<2>().0) {
            // Two uniform numbers have a standard deviation of sqrt(1/6) of their range.
            *value = 0.02 * (pair[0] as f32 + pair[1] as f32 - 65535.0) / (65536.0 / 6f32.sqrt());
        }
    }
    let bytes = compute::narrow(dtype, &values);
    for at in (0..elements * dtype.size()).step_by(bytes.len()) {
        device.write_weight(weight, at, &bytes[..bytes.len().min(elements * dtype.size() - at)]);
    }
}

/// Elements of the matrices that a part of the step multiplies with.
struct Parameters {
    context: u64,
    decision: u64,
}

/// A context needs neither head nor embedding as a matrix, and of the last layer what it leaves alone.
fn context_parameters<D: Device>(model: &Model<D>) -> u64 {
    let (module, layers) = (model.config().decoder.module(), model.config().decoder.layers);
    let (all, last) = (format!("{module}.layers."), format!("{module}.layers.{}.", layers - 1));
    let left =
        |name: &str| ["k_proj", "v_proj", "in_proj_qkv", "in_proj_a", "in_proj_b"].iter().any(|of| name.contains(of));
    let multiplied = |name: &str| name.starts_with(&all) && (!name.starts_with(&last) || left(name));
    let shapes = model.tensors().iter().zip(model.shapes()).filter(|(tensor, _)| multiplied(&tensor.name));
    shapes.map(|(_, (rows, cols))| (rows * cols) as u64).sum()
}

/// Elements of the matrices that train.
fn trained_matrices<D: Device>(optimizer: &Optimizer<D>) -> u64 {
    let trained = optimizer.tensors().iter().filter(|t| t.rows > 1 && t.effective_rule() != apollo::Rule::Frozen);
    trained.map(|t| (t.rows * t.cols) as u64).sum()
}

fn print<D: Backend>(
    options: &Options,
    phases: &[Vec<f64>; 5],
    private: u64,
    machine: &machine::Rates,
    parameters: Parameters,
    optimizer: &Optimizer<D>,
    device: &str,
) {
    let state_bytes = optimizer.state_bytes();
    let (n, n_context) = (parameters.decision as f64, parameters.context as f64);
    let (context, t) = (options.context as f64, options.decision as f64);
    let moved = 4.0 * n * options.dtype.size() as f64 + 2.0 * state_bytes as f64;
    let floor_prefill = 2.0 * n_context * context / machine.dot_flops * 1e3;
    let floor_decision = (6.0 * n * t / machine.dot_flops).max(moved / machine.bytes) * 1e3;
    let names = ["prefill_ms", "forward_ms", "backward_ms", "update_ms", "total_ms"];
    let spread: Vec<(f64, f64, f64)> = phases.iter().map(|p| quartiles(p)).collect();
    if options.json {
        let mut out = json!({"shape": options.shape, "dtype": options.dtype.to_string(), "context": options.context,
            "decision": options.decision, "rank": options.train.rank, "moments": optimizer.settings().moments.to_string(),
            "activations": options.train.activations,
            "steps": options.steps, "device": device});
        for (name, (median, min, max)) in names.iter().zip(&spread) {
            out[*name] = round(*median);
            out["spread"][*name] = json!([round(*min), round(*max)]);
        }
        out["private_memory_mb"] = round(private as f64 / 1e6);
        out["optimizer_state_mb"] = round(state_bytes as f64 / 1e6);
        out["floor_prefill_ms"] = round(floor_prefill);
        out["floor_decision_ms"] = round(floor_decision);
        out["dot_gflops"] = round(machine.dot_flops / 1e9);
        out["bandwidth_gb_s"] = round(machine.bytes / 1e9);
        println!("{out}");
        return;
    }
    println!(
        "{} {}, context {}, decision {}, rank {}, {device}, median of {} steps (least - most)",
        options.shape, options.dtype, options.context, options.decision, options.train.rank, options.steps
    );
    for (name, (median, min, max)) in names.iter().zip(&spread) {
        println!("  {:<10} {median:>9.1} ms  ({min:.1} - {max:.1})", name.trim_end_matches("_ms"));
    }
    println!("  floor      {floor_prefill:>9.1} ms prefill, {floor_decision:.1} ms decision");
    println!("             at {:.0} GFLOP/s dot products and {:.1} GB/s", machine.dot_flops / 1e9, machine.bytes / 1e9);
    println!("  private    {:>9.0} MB, of which moments {:.0} MB", private as f64 / 1e6, state_bytes as f64 / 1e6);
}

/// To three decimals: a step of a GPU takes a few ms.
fn round(value: f64) -> Value {
    json!((value * 1e3).round() / 1e3)
}

/// Median, least and most.
fn quartiles(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    (median, sorted[0], sorted[sorted.len() - 1])
}

/// Most memory that came into use while it was watched.
struct PeakMemory {
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<()>,
}

impl PeakMemory {
    fn watch<D: Backend>(device: Arc<D>) -> PeakMemory {
        let before = device.memory_in_use();
        let (peak, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (peak, stop) = (peak.clone(), stop.clone());
            move || {
                while !stop.load(Relaxed) {
                    peak.fetch_max(device.memory_in_use().saturating_sub(before), Relaxed);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        PeakMemory { peak, stop, thread }
    }

    /// Bytes.
    fn peak(self) -> u64 {
        self.stop.store(true, Relaxed);
        let _ = self.thread.join();
        self.peak.load(Relaxed)
    }
}

/// Private resident bytes of this process (proc(5), RssAnon).
pub fn rss_anon() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("RssAnon:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
