//! Live copies of a model directory: what is copied, what is refused, and what attaching to one gives.

mod common;

use common::{bf16, content, decoder, model, write_config, write_file, write_model, write_sharded};
use ipc::{Attachment, Error, STAGE_MARKER, SafetensorsDir, Source, StageMarker, StageReport, stage};
use safetensors::tensor::Dtype;
use std::path::Path;
use weight_map::{Decoder, Experts, HfTensor};

fn staged(model: &Path, live: &Path) -> Result<StageReport, Error> {
    stage(model, live, &mut |_, _| {})
}

fn attach(live: &Path, expected: &[HfTensor]) -> Result<Attachment, Error> {
    Attachment::open(&Source::Staged(live.to_owned()), expected)
}

/// Every file of a directory with its bytes.
fn contents(dir: &Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name(), std::fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn a_live_copy_is_trained_in_place_and_the_model_directory_is_not() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    let before = contents(&model);
    let report = staged(&model, &live).unwrap();
    assert_eq!(report.tensors, expected.len());
    assert_eq!(report.files, 3);
    let attachment = attach(&live, &expected).unwrap();
    assert_eq!(attachment.epoch(), report.epoch);
    assert_eq!(attachment.model_dir(), model.canonicalize().unwrap());
    assert_eq!(attachment.pid(), None);
    assert!(attachment.alive());
    attachment.find("model.norm.weight").unwrap().write(2, &[1, 2]);
    // A server's view: the file itself.
    let read = SafetensorsDir::open(&live).unwrap();
    let (norm, untouched) = ("model.norm.weight", "model.embed_tokens.weight");
    assert_eq!(read.bytes(norm).unwrap()[..4], [content(norm, 2)[0], content(norm, 2)[1], 1, 2]);
    assert_eq!(read.bytes(untouched).unwrap(), content(untouched, 160));
    assert_eq!(contents(&model), before);
}

#[test]
fn staging_again_brings_back_the_model_with_a_new_epoch() {
    let (dir, model, expected) = model(false);
    let live = dir.path().join("live");
    let first = staged(&model, &live).unwrap();
    attach(&live, &expected).unwrap().tensor(0).write(0, &[5, 5]);
    let second = staged(&model, &live).unwrap();
    assert_ne!(first.epoch, second.epoch);
    assert_eq!(attach(&live, &expected).unwrap().tensor(0).read(), content(&expected[0].name, 160));
}

#[test]
fn only_one_trainer_and_no_staging_while_it_trains() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    staged(&model, &live).unwrap();
    let first = attach(&live, &expected).unwrap();
    let own = std::process::id();
    for error in [attach(&live, &expected).unwrap_err(), staged(&model, &live).unwrap_err()] {
        assert!(matches!(error, Error::Leased { pid: Some(pid), .. } if pid == own), "{error}");
    }
    drop(first);
    staged(&model, &live).unwrap();
}

#[test]
fn progress_ends_at_the_bytes_of_the_weights() {
    let (dir, model, _) = model(true);
    let mut calls = Vec::new();
    let report = stage(&model, &dir.path().join("live"), &mut |done, total| calls.push((done, total))).unwrap();
    assert!(calls.is_sorted() && calls.len() > 2);
    assert_eq!(calls[0], (0, report.bytes));
    assert_eq!(calls.last(), Some(&(report.bytes, report.bytes)));
}

#[test]
fn a_live_copy_lies_apart_from_the_model_and_from_other_things() {
    let (dir, first, _) = model(true);
    let other = dir.path().join("other");
    write_model(&other, &decoder(true));
    let busy = dir.path().join("busy");
    std::fs::create_dir(&busy).unwrap();
    std::fs::write(busy.join("thesis.tex"), "years of work").unwrap();
    let live = dir.path().join("live");
    staged(&first, &live).unwrap();
    for (model, live, want) in [
        (&first, &first, "must lie apart"),
        (&first, &first.join("live"), "must lie apart"),
        (&first, &dir.path().to_owned(), "must lie apart"),
        (&first, &busy, "thesis.tex"),
        (&other, &live, "live copy of another model"),
    ] {
        let error = staged(model, live).unwrap_err().to_string();
        assert!(error.contains(want), "{}: {error}", live.display());
    }
    assert_eq!(std::fs::read(busy.join("thesis.tex")).unwrap(), b"years of work");
    assert_eq!(contents(&busy).len(), 1);
}

#[test]
fn a_quantized_model_is_refused_by_name() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    let config = r#"{"quantization_config": {"quant_method": "awq"}}"#;
    std::fs::write(model.join("config.json"), config).unwrap();
    let error = staged(&model, &live).unwrap_err().to_string();
    assert!(error.contains("quantized") && error.contains("awq"), "{error}");
    write_config(&model, true);
    let mut tensors: Vec<_> = expected.iter().map(bf16).collect();
    tensors[4].1 = Dtype::I16;
    write_file(&model.join("model.safetensors"), &tensors);
    let error = staged(&model, &live).unwrap_err().to_string();
    assert!(error.contains(&expected[4].name) && error.contains("I16"), "{error}");
    assert!(!live.exists());
}

/// transformers stacks experts that files hold apart in memory of its own; of stacks it maps the file.
#[test]
fn experts_are_staged_in_stacks_only() {
    let dir = tempfile::tempdir().unwrap();
    let experts = Experts { count: 3, per_token: 1, intermediate: 6, shared: None, layers: vec![true; 2] };
    let decoder = Decoder { experts: Some(experts), ..decoder(true) };
    let (apart, live) = (dir.path().join("apart"), dir.path().join("live"));
    let expected = write_model(&apart, &decoder);
    let error = staged(&apart, &live).unwrap_err().to_string();
    assert!(error.contains("experts.0.down_proj.weight") && error.contains("apollod.export"), "{error}");
    // The same bytes under other names: 3 experts of one row count each.
    let stacked = dir.path().join("stacked");
    write_config_into(&stacked);
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for tensor in &expected {
        let (name, parts) = weight_map::stack_of(&tensor.name).unwrap_or((tensor.name.clone(), 1));
        let name = name.replace("w13_weight", "gate_up_proj").replace("w2_weight", "down_proj");
        let (_, dtype, shape, bytes) = bf16(tensor);
        match tensors.iter_mut().find(|(before, ..)| *before == name) {
            Some((.., before)) => before.extend(bytes),
            None if name == tensor.name => tensors.push((name, dtype, shape, bytes)),
            None => tensors.push((name, dtype, vec![3, parts * shape[0], shape[1]], bytes)),
        }
    }
    // A head that copies the embedding is left out of the copy, and experts that predict further tokens stay alone.
    let head = (String::from("lm_head.weight"), tensors[0].1, tensors[0].2.clone(), tensors[0].3.clone());
    let further = String::from("mtp.layers.0.mlp.experts.0.down_proj.weight");
    tensors.extend([head, (further, Dtype::BF16, vec![2, 2], vec![0; 8])]);
    write_file(&stacked.join("model.safetensors"), &tensors);
    let report = staged(&stacked, &live).unwrap();
    assert_eq!(report.left_out, ["lm_head.weight"]);
    let attachment = attach(&live, &expected).unwrap();
    for tensor in &expected {
        let bytes = tensor.shape.iter().product::<usize>() * 2;
        assert_eq!(attachment.find(&tensor.name).unwrap().read(), content(&tensor.name, bytes), "{}", tensor.name);
    }
}

fn write_config_into(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    write_config(dir, true);
}

#[test]
fn links_of_a_cache_become_files_of_their_own() {
    let (dir, model, expected) = model(true);
    let blob = dir.path().join("blob");
    std::fs::rename(model.join("model.safetensors"), &blob).unwrap();
    std::os::unix::fs::symlink(&blob, model.join("model.safetensors")).unwrap();
    let live = dir.path().join("live");
    staged(&model, &live).unwrap();
    assert!(live.join("model.safetensors").symlink_metadata().unwrap().is_file());
    let before = std::fs::read(&blob).unwrap();
    attach(&live, &expected).unwrap().tensor(0).write(0, &[5, 5]);
    assert_eq!(std::fs::read(&blob).unwrap(), before);
}

#[test]
fn a_file_of_the_model_directory_is_never_mapped_for_writing() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    staged(&model, &live).unwrap();
    std::fs::remove_file(live.join("model.safetensors")).unwrap();
    std::fs::hard_link(model.join("model.safetensors"), live.join("model.safetensors")).unwrap();
    let error = attach(&live, &expected).unwrap_err().to_string();
    assert!(error.contains("which only a sync may write"), "{error}");
}

#[test]
fn a_copy_of_the_embedding_as_tied_head_is_left_out() {
    let (dir, model, expected) = model(true);
    let mut tensors: Vec<_> = expected.iter().map(bf16).collect();
    let mut head = tensors[0].clone();
    head.0 = "lm_head.weight".into();
    tensors.insert(3, head);
    let sharded = dir.path().join("sharded");
    write_sharded(&sharded, true, &tensors);
    write_file(&model.join("model.safetensors"), &tensors);
    for (model, live) in [(&model, "live"), (&sharded, "live_sharded")] {
        let live = dir.path().join(live);
        let report = staged(model, &live).unwrap();
        assert_eq!(report.left_out, ["lm_head.weight"]);
        let attachment = attach(&live, &expected).unwrap();
        for tensor in (0..attachment.len()).map(|index| attachment.tensor(index)) {
            assert_eq!(tensor.read(), content(tensor.name, tensor.bytes), "{}", tensor.name);
        }
        for shard in SafetensorsDir::open(&live).unwrap().shards() {
            safetensors::SafeTensors::deserialize(&std::fs::read(&shard.path).unwrap()).unwrap();
        }
    }
    tensors[3].3[0] ^= 1;
    write_file(&model.join("model.safetensors"), &tensors);
    let error = staged(&model, &dir.path().join("live")).unwrap_err().to_string();
    assert!(error.contains("`lm_head.weight`") && error.contains("differ"), "{error}");
}

#[test]
fn an_interrupted_stage_is_not_attached_and_can_be_made_again() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    assert!(matches!(attach(&model, &expected).unwrap_err(), Error::Stage { .. }), "a model directory is no live copy");
    staged(&model, &live).unwrap();
    let mut marker = StageMarker::read(&live).unwrap().unwrap();
    marker.complete = false;
    std::fs::write(live.join(STAGE_MARKER), serde_json::to_vec(&marker).unwrap()).unwrap();
    let error = attach(&live, &expected).unwrap_err().to_string();
    assert!(error.contains("interrupted"), "{error}");
    staged(&model, &live).unwrap();
    attach(&live, &expected).unwrap();
}

#[test]
fn a_truncated_live_file_is_refused() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    staged(&model, &live).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(live.join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    assert!(matches!(attach(&live, &expected).unwrap_err(), Error::Safetensors { .. }));
}
