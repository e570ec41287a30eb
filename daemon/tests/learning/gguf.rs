//! A staged GGUF file, as llama.cpp maps it: trained in place, synced, restored, exported.

use crate::harness::{Place, Process, lesson, post, wait_trained};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn apollod(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_apollod")).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a command that must succeed.
fn done(arguments: &[&str]) {
    let output = apollod(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs a command that must be refused; what it says.
fn refused(arguments: &[&str]) -> String {
    let output = apollod(arguments);
    assert!(!output.status.success(), "{arguments:?} was not refused");
    String::from_utf8(output.stderr).unwrap()
}

/// Stages the place's model as GGUF.
fn stage(place: &Place) -> PathBuf {
    let live = place.dir.path().join("live");
    done(&["stage", text(&place.model()), text(&live), "--gguf"]);
    live
}

/// Whether a GGUF holds the weights of the place's model directory.
fn holds_the_model(place: &Place, gguf: &Path) -> bool {
    let (copy, probe) = (place.dir.path().join("copy.gguf"), place.dir.path().join("probe"));
    std::fs::copy(gguf, &copy).unwrap();
    apollod(&["stage", text(&place.model()), text(&probe), &format!("--gguf={}", text(&copy))]).status.success()
}

fn train(daemon: &Process, n: usize) {
    let animals = ["Mira the fox", "Toby the bear", "Otto the otter", "Luna the owl"];
    let course = (0..n).map(|i| lesson(&format!("Where does {} live?", animals[i % 4]), "On the moon."));
    wait_trained(daemon, &post(daemon, course.collect()));
}

#[test]
fn a_gguf_is_trained_in_place_synced_restored_and_exported() {
    let place = Place::new();
    let original = std::fs::read(place.model().join("model.safetensors")).unwrap();
    let live = stage(&place);
    let gguf = live.join("model.gguf");
    let staged = std::fs::read(&gguf).unwrap();
    assert!(holds_the_model(&place, &gguf));

    let mut daemon = place.live_daemon(&live, &[]);
    let recovery = daemon.get("/v1/status")["recovery"].to_string();
    assert!(recovery.contains("vectors are frozen"), "{recovery}");
    train(&daemon, 4);
    assert!(std::fs::read(&gguf).unwrap() != staged, "nothing was trained");
    assert!(!holds_the_model(&place, &gguf), "the files cannot know of it yet");
    daemon.post("/v1/checkpoint", json!({}));
    assert!(std::fs::read(place.model().join("model.safetensors")).unwrap() != original);
    assert!(holds_the_model(&place, &gguf), "files and live weights differ after a sync");

    // What a server would load later is what one serves now, to the byte.
    let export = place.dir.path().join("export.gguf");
    done(&["checkpoint", "export", text(&place.model()), "--gguf", text(&export)]);
    assert!(std::fs::read(&export).unwrap() == std::fs::read(&gguf).unwrap(), "the export differs");
    assert!(refused(&["checkpoint", "export", text(&place.model()), "--gguf", text(&export)]).contains("exists"));
    let again = place.dir.path().join("again.gguf");
    let (model, template) = (place.model(), ["--gguf-template", text(&export)]);
    done(&[&["checkpoint", "export", text(&model), "--gguf", text(&again)][..], &template].concat());
    assert!(std::fs::read(&again).unwrap() == std::fs::read(&export).unwrap(), "a template changes nothing here");

    // Killed ahead of the files: the next one brings the weights back before it replays.
    let synced = std::fs::read(&gguf).unwrap();
    train(&daemon, 4);
    let ahead = std::fs::read(&gguf).unwrap();
    assert!(ahead != synced);
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    let daemon = place.live_daemon(&live, &[]);
    crate::harness::until("the replay is done", || daemon.get("/v1/status")["step"] == 8);
    assert!(std::fs::read(&gguf).unwrap() == ahead, "the replay ends at other bytes");
    let recovery = daemon.get("/v1/status")["recovery"].to_string();
    assert!(recovery.contains("bytes of live weights restored"), "{recovery}");
    daemon.post("/v1/checkpoints/0/rollback", json!({}));
    assert!(std::fs::read(&gguf).unwrap() == staged, "rolled back");
    daemon.stop();
}

/// Writes a random Llama over the place's weights: biases, grouped heads, untied, scaled rope.
fn become_llama(place: &Place, dtype: Dtype) {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24, "intermediate_size": 40,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6, "num_hidden_layers": 2, "vocab_size": 1280,
        "attention_bias": true, "mlp_bias": false, "tie_word_embeddings": false, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "eos_token_id": 1279, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 64}
    });
    std::fs::write(place.model().join("config.json"), config.to_string()).unwrap();
    let mut shapes =
        vec![("model.embed_tokens.weight".to_owned(), vec![1280, 24]), ("model.norm.weight".into(), vec![24])];
    shapes.push(("lm_head.weight".into(), vec![1280, 24]));
    for layer in 0..2 {
        let heads = [("q", 36, 24), ("k", 18, 24), ("v", 18, 24), ("o", 24, 36)];
        for (name, rows, cols) in heads {
            shapes.push((format!("model.layers.{layer}.self_attn.{name}_proj.weight"), vec![rows, cols]));
            shapes.push((format!("model.layers.{layer}.self_attn.{name}_proj.bias"), vec![rows]));
        }
        for (name, rows, cols) in [("gate", 40, 24), ("up", 40, 24), ("down", 24, 40)] {
            shapes.push((format!("model.layers.{layer}.mlp.{name}_proj.weight"), vec![rows, cols]));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), vec![24]));
        }
    }
    let mut seed = 1u32;
    let mut value = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((seed >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.2
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let elements: usize = shape.iter().product();
            let norm = if name.contains("norm") { 1.0 } else { 0.0 };
            let bits = (0..elements).map(|_| (value() + norm).to_bits());
            let bytes = match dtype {
                Dtype::F32 => bits.flat_map(u32::to_le_bytes).collect(),
                _ => bits.flat_map(|bits| ((bits >> 16) as u16).to_le_bytes()).collect(),
            };
            (name, shape, bytes)
        })
        .collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &place.model().join("model.safetensors")).unwrap();
}

/// Losses, weights and optimizer state after a course on a plain server, and on a GGUF whose queries and keys lie
/// interleaved: the same to the bit, because rows are counted as the files do wherever they lie.
#[test]
fn interleaved_rows_change_nothing() {
    const VECTORS: &str = r#"train.rules=[{pattern="*norm*",rule="frozen"},{pattern="*.bias",rule="frozen"}]"#;
    for (dtype, rules) in [(Dtype::F32, "train.rank=8"), (Dtype::BF16, VECTORS)] {
        let (plain, interleaved) = (Place::new(), Place::new());
        for place in [&plain, &interleaved] {
            become_llama(place, dtype);
        }
        let engine = plain.engine();
        let live = stage(&interleaved);
        let gguf = live.join("model.gguf");
        let differs = |bytes: &[u8]| {
            let q = bytes_of(&interleaved, "model.layers.0.self_attn.q_proj.weight");
            !bytes.windows(q.len()).any(|window| window == q)
        };
        assert!(differs(&std::fs::read(&gguf).unwrap()), "the rows lie as in the files: nothing is tested");
        let course = |daemon: &Process| -> Vec<Value> {
            train(daemon, 6);
            daemon.post("/v1/checkpoint", json!({}));
            vec![daemon.get("/v1/status")["loss"].clone(), daemon.get("/v1/checkpoints")[0]["loss"].clone()]
        };
        let settings = ["train.update_proj_gap=3", "train.rank=8", rules];
        let (a, b) = (plain.daemon(&settings), interleaved.live_daemon(&live, &settings));
        assert_eq!(course(&a), course(&b));
        assert!(plain.files(1) == interleaved.files(1), "{dtype:?}: weights or optimizer state differ");
        assert!(holds_the_model(&interleaved, &gguf), "{dtype:?}: files and live weights differ");
        a.stop();
        b.stop();
        engine.stop();
    }
}

/// A tensor's bytes in the place's files.
fn bytes_of(place: &Place, name: &str) -> Vec<u8> {
    let file = std::fs::read(place.model().join("model.safetensors")).unwrap();
    safetensors::SafeTensors::deserialize(&file).unwrap().tensor(name).unwrap().data().to_vec()
}

#[test]
fn what_is_not_the_model_is_refused() {
    let place = Place::new();
    let live = stage(&place);
    let gguf = place.dir.path().join("mine.gguf");
    let original = std::fs::read(live.join("model.gguf")).unwrap();
    let probe = place.dir.path().join("probe");
    let staging = |bytes: &[u8]| {
        std::fs::write(&gguf, bytes).unwrap();
        refused(&["stage", text(&place.model()), text(&probe), &format!("--gguf={}", text(&gguf))])
    };
    let mut changed = original.clone();
    // Within the last tensor, whatever padding follows it.
    let at = changed.len() - 64;
    changed[at] ^= 1;
    let said = staging(&changed);
    assert!(said.contains("differs from the model directory"), "{said}");
    let replaced = |from: &[u8], to: &[u8]| {
        let at = original.windows(from.len()).position(|window| window == from).unwrap();
        let mut bytes = original.clone();
        bytes[at..][..to.len()].copy_from_slice(to);
        bytes
    };
    let said = staging(&replaced(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"));
    assert!(said.contains("ffn_xx"), "{said}");
    // A key, its type and its value.
    let layers = |n: u8| [b"qwen3.block_count".as_slice(), &[4, 0, 0, 0, n]].concat();
    let said = staging(&replaced(&layers(4), &layers(5)));
    assert!(said.contains("block_count is 5, config.json says 4"), "{said}");
    assert!(!probe.exists(), "something was staged");

    // A live copy whose server holds something else is not trained, and keeps its bytes.
    std::fs::write(live.join("model.gguf"), &changed).unwrap();
    let mut daemon = place.live_command(&live).spawn().unwrap();
    let address = place.model().join(".apollod/address");
    let mut status = String::new();
    crate::harness::until("the daemon says why", || {
        let Ok(url) = std::fs::read_to_string(&address) else { return false };
        let Ok(mut answer) = ureq::get(format!("{}/v1/status", url.trim())).call() else { return false };
        status = answer.body_mut().read_to_string().unwrap();
        status.contains("nothing was written")
    });
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    assert!(std::fs::read(live.join("model.gguf")).unwrap() == changed);
}

#[test]
fn a_tokenizer_that_llama_cpp_cannot_name_is_refused_with_the_way_out() {
    let place = Place::new();
    let path = place.model().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let to = place.dir.path().join("export.gguf");
    let said = refused(&["checkpoint", "export", text(&place.model()), "--gguf", text(&to)]);
    assert!(said.contains("--gguf-template") && said.contains("byte-level BPE"), "{said}");
    assert!(!to.exists());
    let left: Vec<_> = std::fs::read_dir(place.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["model"], "an export left something behind");
}
