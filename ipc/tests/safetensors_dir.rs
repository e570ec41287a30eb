//! Reading safetensors files that are whole, cut, and lying; and manifests that were damaged anywhere.

mod common;

use common::{bf16, content, decoder, model, write_sharded};
use ipc::{Error, Manifest, SafetensorsDir, SharedWeights};
use proptest::prelude::*;
use safetensors::SafeTensors;

fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(vec![0; data]);
    file
}

/// What the reader says of a directory whose only file has these bytes.
fn open(bytes: &[u8]) -> Result<SafetensorsDir, Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    SafetensorsDir::open(dir.path())
}

#[test]
fn a_file_and_a_sharded_model_read_alike() {
    let (dir, single, expected) = model(false);
    let sharded = dir.path().join("sharded");
    write_sharded(&sharded, false, &expected.iter().map(bf16).collect::<Vec<_>>());
    for (dir, shards) in [(&single, 1), (&sharded, 2)] {
        let read = SafetensorsDir::open(dir).unwrap();
        assert_eq!((read.shards().len(), read.tensors().len()), (shards, expected.len()));
        for tensor in &expected {
            let bytes = read.bytes(&tensor.name).unwrap();
            assert_eq!(bytes, content(&tensor.name, bytes.len()), "{}", tensor.name);
            assert_eq!(read.find(&tensor.name).unwrap().shape, tensor.shape);
            let mut copy = vec![0; bytes.len()];
            read.read_into(&tensor.name, &mut copy).unwrap();
            assert_eq!(copy, bytes);
        }
    }
}

#[test]
fn a_directory_without_weights_says_what_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let error = SafetensorsDir::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("model.safetensors.index.json"), "{error}");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let (_dir, model, _) = model(true);
    let path = model.join("model.safetensors");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let whole = file.metadata().unwrap().len();
    assert!(SafetensorsDir::open(&model).is_ok());
    for length in (0..whole).rev() {
        file.set_len(length).unwrap();
        assert!(SafetensorsDir::open(&model).is_err(), "cut to {length} of {whole} bytes");
    }
}

#[test]
fn headers_that_lie_are_refused_by_name() {
    let entry = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let max = u64::MAX;
    for (header, data) in [
        (format!(r#"{{"liar":{}}}"#, entry("[2,2]", 0, 16)), 8),
        (format!(r#"{{"liar":{}}}"#, entry("[2,2]", 8, 0)), 8),
        (format!(r#"{{"liar":{}}}"#, entry("[2,2]", 8, 16)), 16),
        (format!(r#"{{"liar":{}}}"#, entry("[3,2]", 0, 8)), 8),
        (format!(r#"{{"liar":{}}}"#, entry("[4611686018427387904,4]", 0, 8)), 8),
        (format!(r#"{{"liar":{}}}"#, entry("[0,4611686018427387904,4611686018427387904]", 0, 0)), 0),
        (format!(r#"{{"liar":{}}}"#, entry("[2,2]", 0, max)), 8),
        (format!(r#"{{"a":{},"liar":{}}}"#, entry("[2,2]", 0, 8), entry("[2,2]", 4, 12)), 12),
        (format!(r#"{{"liar":{},"liar":{}}}"#, entry("[2,2]", 0, 8), entry("[2,2]", 0, 8)), 8),
    ] {
        let error = open(&with_header(&header, data)).unwrap_err().to_string();
        assert!(error.contains("`liar`"), "{header}: {error}");
    }
    for (header, data) in
        [("[]", 0), ("{", 0), ("{}x", 0), ("{}", 8), (r#"{"a":1}"#, 0), (r#"{"a":{"dtype":"F32"}}"#, 0)]
    {
        assert!(open(&with_header(header, data)).is_err(), "{header}");
    }
    let mut long = with_header("{}", 0);
    long[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(open(&long).is_err());
}

#[test]
fn an_unaligned_or_quantized_tensor_can_be_read_but_not_attached() {
    let unaligned = r#"{"odd":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}} "#;
    assert_eq!((8 + unaligned.len()) % 2, 0);
    let dir = open(&with_header(unaligned.trim_end(), 4)).unwrap();
    let error = dir.server_tensors().unwrap_err().to_string();
    assert!(error.contains("`odd`") && error.contains("save_pretrained"), "{error}");
    let quantized = r#"{"int":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#;
    let error = open(&with_header(quantized, 4)).unwrap().server_tensors().unwrap_err().to_string();
    assert!(error.contains("`int`") && error.contains("F8_E4M3"), "{error}");
}

#[test]
fn the_experts_of_a_stack_are_tensors_of_their_own() {
    let stack = |name: &str, shape: &str, start: usize, end: usize| {
        format!(r#""m.mlp.experts.{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let header =
        format!("{{{},{}}}", stack("gate_up_proj", "[3,4,5]", 0, 120), stack("down_proj", "[3,5,2]", 120, 180));
    let mut file = with_header(&header, 180);
    let start = file.len() - 180;
    (0..180).for_each(|i| file[start + i] = i as u8);
    let dir = tempfile::tempdir().unwrap();
    let name = "model-00001-of-00001.safetensors";
    std::fs::write(dir.path().join(name), &file).unwrap();
    let index = |names: &[&str]| {
        let places: Vec<String> = names.iter().map(|stack| format!(r#""m.mlp.experts.{stack}":"{name}""#)).collect();
        let text = format!(r#"{{"weight_map":{{{}}}}}"#, places.join(","));
        std::fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
        SafetensorsDir::open(dir.path())
    };
    let read = index(&["gate_up_proj", "down_proj"]).unwrap();
    let bytes = |part: &str| read.bytes(&format!("m.mlp.experts.{part}_proj.weight")).unwrap().to_vec();
    // gate (2,5) and up (2,5) of each expert in turn, then down (5,2).
    for (part, first) in [("0.gate", 0), ("0.up", 20), ("1.gate", 40), ("2.up", 100), ("0.down", 120), ("2.down", 160)]
    {
        assert_eq!(bytes(part), (first..first + 20).collect::<Vec<u8>>(), "{part}");
    }
    assert_eq!(read.tensors().len(), 9);
    assert_eq!(read.find("m.mlp.experts.1.down_proj.weight").unwrap().shape, [5, 2]);
    // A stack, and an expert of it by itself.
    let alone = r#""m.mlp.experts.1.down_proj.weight":{"dtype":"BF16","shape":[5,2],"data_offsets":[180,200]}"#;
    let twice = with_header(&format!("{},{alone}}}", &header[..header.len() - 1]), 200);
    let error = open(&twice).unwrap_err().to_string();
    assert!(error.contains("`m.mlp.experts.1.down_proj.weight` is in model.safetensors as well"), "{error}");
    let error = index(&["gate_up_proj"]).unwrap_err().to_string();
    assert!(error.contains("does not list `m.mlp.experts.down_proj`"), "{error}");
}

#[test]
fn an_index_that_disagrees_with_its_files_is_refused() {
    let (dir, _, expected) = model(true);
    let sharded = dir.path().join("sharded");
    write_sharded(&sharded, true, &expected.iter().map(bf16).collect::<Vec<_>>());
    let path = sharded.join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let norm = "\"model.norm.weight\":\"model-00002-of-00002.safetensors\"";
    assert!(text.contains(norm));
    for (replacement, want) in [
        (norm.replace("00002-of", "00001-of"), "`model.norm.weight`"),
        (norm.replace("model-00002", "../model-00002"), "no plain file name"),
        (norm.replace("model.norm", "model.form"), "`model.form.weight`"),
        (norm.replace("model-00002", "model-00003"), "model-00003-of-00002"),
    ] {
        std::fs::write(&path, text.replace(norm, &replacement)).unwrap();
        let error = SafetensorsDir::open(&sharded).unwrap_err().to_string();
        assert!(error.contains(want), "{replacement}: {error}");
    }
    std::fs::write(&path, text.replace(&format!(",{norm}"), "")).unwrap();
    let error = SafetensorsDir::open(&sharded).unwrap_err().to_string();
    assert!(error.contains("does not list `model.norm.weight`"), "{error}");
}

proptest! {
    // A failure prints its shrunken input; nothing is written beside the sources.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn a_file_that_is_accepted_is_accepted_by_the_safetensors_crate_too(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let header = r#"{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}}"#;
        let mut file = with_header(header, 20);
        for (at, value) in edits {
            let at = at.index(8 + header.len());
            file[at] = value;
        }
        if let Ok(dir) = open(&file) {
            for tensor in dir.tensors() {
                prop_assert!(tensor.offset + tensor.bytes <= file.len() as u64);
            }
            if let Err(error) = SafeTensors::deserialize(&file) {
                // The one thing that the crate refuses and this reader leaves to its caller: unknown types.
                let unknown = dir.tensors().iter().any(|tensor| tensor.dtype().is_err());
                prop_assert!(unknown, "the crate refuses it: {error}");
            }
        }
    }

    #[test]
    fn a_damaged_manifest_never_panics_and_never_leaves_its_allocation(
        bytes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        numbers in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 0..3),
    ) {
        let mut text = manifest_text();
        for (at, number) in numbers {
            text = replace_number(&text, at, number);
        }
        let mut document = text.into_bytes();
        for (at, value) in bytes {
            let at = at.index(document.len());
            document[at] = value;
        }
        if let Ok(manifest) = Manifest::parse(&document) {
            let tensors = manifest.server_tensors().unwrap();
            for tensor in &tensors {
                let bytes = manifest.allocations[tensor.allocation].bytes();
                let last: u128 = tensor.shape.iter().zip(&tensor.strides)
                    .map(|(&n, &stride)| (n as u128).saturating_sub(1) * stride as u128).sum();
                let empty = tensor.shape.contains(&0);
                let span = if empty { 0 } else { (last + 1) * tensor.dtype.size() as u128 };
                prop_assert!(u128::from(tensor.offset) + span <= u128::from(bytes));
            }
            let _ = weight_map::map(&decoder(true).tensors(), &tensors, &manifest.packing);
        }
    }
}

fn manifest_text() -> String {
    static TEXT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    TEXT.get_or_init(|| {
        let (_dir, model, expected) = model(true);
        let weights = SharedWeights::load(&model, &expected, None).unwrap();
        serde_json::to_string(weights.manifest()).unwrap()
    })
    .clone()
}

/// Puts `number` in the place of one of the numbers in a JSON text.
fn replace_number(text: &str, at: prop::sample::Index, number: u64) -> String {
    let starts: Vec<usize> = text
        .char_indices()
        .filter(|&(i, c)| c.is_ascii_digit() && matches!(text.as_bytes()[i - 1], b':' | b'[' | b','))
        .map(|(i, _)| i)
        .collect();
    let start = starts[at.index(starts.len())];
    let length = text[start..].bytes().take_while(u8::is_ascii_digit).count();
    format!("{}{number}{}", &text[..start], &text[start + length..])
}
