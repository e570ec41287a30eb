//! Small models on disk, written by the safetensors crate, whose reader is the oracle for ours.

#![allow(dead_code, reason = "each test program uses its part")]

pub mod processes;

use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use weight_map::{Decoder, Family, HfTensor};

pub fn decoder(tied: bool) -> Decoder {
    Decoder {
        family: Family::Qwen3,
        layers: 2,
        hidden: 8,
        intermediate: 12,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        vocab: 10,
        attention_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: true,
        output_gate: false,
        delta_net: None,
        experts: None,
        wrapped: false,
        tied,
    }
}

/// Bytes that say which tensor and which place they are from.
pub fn content(name: &str, bytes: usize) -> Vec<u8> {
    let salt = name.bytes().fold(7u8, |salt, byte| salt.wrapping_mul(31).wrapping_add(byte));
    (0..bytes).map(|at| salt.wrapping_add(at as u8)).collect()
}

pub fn write_file(path: &Path, tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) {
    let views: Vec<(&String, TensorView)> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
        .collect();
    safetensors::serialize_to_file(views, Some(HashMap::from([("format".into(), "pt".into())])), path).unwrap();
}

pub fn bf16(tensor: &HfTensor) -> (String, Dtype, Vec<usize>, Vec<u8>) {
    let bytes = tensor.shape.iter().product::<usize>() * 2;
    (tensor.name.clone(), Dtype::BF16, tensor.shape.clone(), content(&tensor.name, bytes))
}

pub fn write_config(dir: &Path, tied: bool) {
    let config = serde_json::json!({"model_type": "qwen3", "tie_word_embeddings": tied});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{}").unwrap();
}

/// A model directory with one file.
pub fn write_model(dir: &Path, decoder: &Decoder) -> Vec<HfTensor> {
    std::fs::create_dir_all(dir).unwrap();
    let expected = decoder.tensors();
    write_file(&dir.join("model.safetensors"), &expected.iter().map(bf16).collect::<Vec<_>>());
    write_config(dir, decoder.tied);
    expected
}

/// A model directory with two files and an index.
pub fn write_sharded(dir: &Path, tied: bool, tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) {
    std::fs::create_dir_all(dir).unwrap();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut index = serde_json::Map::new();
    for (file, tensors) in names.iter().zip([first, second]) {
        write_file(&dir.join(file), tensors);
        index.extend(tensors.iter().map(|tensor| (tensor.0.clone(), (*file).into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 0}, "weight_map": index});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    write_config(dir, tied);
}

/// A directory with a model in `model`.
pub fn model(tied: bool) -> (tempfile::TempDir, PathBuf, Vec<HfTensor>) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let expected = write_model(&model, &decoder(tied));
    (dir, model, expected)
}
