//! GGUF files: what is read, what is refused, and what attaching to one gives.

mod common;

use common::{content, decoder, model};
use ipc::{Attachment, Error, GGUF_FILE, GgufFile, GgufLayout, GgufValue, NewTensor, Source, stage_gguf};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use weight_map::{Dtype, HfTensor, RowOrder, gguf_name};

/// Metadata of every type, and those that `llama` needs.
fn metadata(architecture: &str) -> Vec<(String, GgufValue)> {
    let plain = [
        ("general.architecture".into(), GgufValue::string(architecture)),
        (format!("{architecture}.embedding_length"), GgufValue::U32(8)),
        (format!("{architecture}.attention.head_count"), GgufValue::U32(2)),
        ("a.u8".into(), GgufValue::U8(200)),
        ("a.i8".into(), GgufValue::I8(-3)),
        ("a.u16".into(), GgufValue::U16(60_000)),
        ("a.i16".into(), GgufValue::I16(-3)),
        ("a.i32".into(), GgufValue::I32(-3)),
        ("a.f32".into(), GgufValue::F32(0.5)),
        ("a.bool".into(), GgufValue::Bool(true)),
        ("a.u64".into(), GgufValue::U64(1 << 40)),
        ("a.i64".into(), GgufValue::I64(-(1 << 40))),
        ("a.f64".into(), GgufValue::F64(0.25)),
        ("a.strings".into(), GgufValue::strings(["one", "", "thrée"])),
        ("a.i32s".into(), GgufValue::i32s([1, -2])),
        ("a.nothing".into(), GgufValue::i32s([])),
    ];
    plain.into()
}

/// The model's tensors as llama.cpp names them, vectors in f32.
fn tensors(expected: &[HfTensor]) -> Vec<NewTensor> {
    let tensor = |t: &HfTensor| NewTensor {
        name: gguf_name(&t.name).unwrap(),
        shape: t.shape.clone(),
        dtype: if t.shape.len() == 1 { Dtype::F32 } else { Dtype::BF16 },
    };
    expected.iter().map(tensor).collect()
}

/// A file's bytes; each tensor's are those of [`content`] of its name.
fn bytes(metadata: &[(String, GgufValue)], tensors: &[NewTensor]) -> Vec<u8> {
    let layout = GgufLayout::new(metadata, tensors);
    let mut bytes = layout.header.clone();
    bytes.resize(layout.bytes as usize, 0);
    for (tensor, offset) in tensors.iter().zip(&layout.offsets) {
        let data = content(&tensor.name, tensor.bytes() as usize);
        bytes[*offset as usize..][..data.len()].copy_from_slice(&data);
    }
    bytes
}

struct Staged {
    _dir: tempfile::TempDir,
    live: PathBuf,
    expected: Vec<HfTensor>,
}

fn staged(bytes: &[u8]) -> Result<Staged, Error> {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    stage_gguf(&model, &live, bytes.len() as u64, |path| {
        std::fs::write(path, bytes).unwrap();
        Ok::<_, Error>(())
    })?;
    Ok(Staged { _dir: dir, live, expected })
}

fn attach(staged: &Staged) -> Result<Attachment, Error> {
    Attachment::open(&Source::Staged(staged.live.clone()), &staged.expected)
}

fn open(bytes: &[u8]) -> Result<GgufFile, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path)
}

#[test]
fn what_is_written_is_read_back() {
    let (metadata, tensors) = (metadata("qwen3"), tensors(&decoder(true).tensors()));
    let file = open(&bytes(&metadata, &tensors)).unwrap();
    assert_eq!(file.metadata(), metadata);
    let read = file.server_tensors().unwrap();
    assert_eq!(read.len(), tensors.len());
    for (read, tensor) in read.iter().zip(&tensors) {
        assert_eq!((&read.name, &read.shape, read.dtype), (&tensor.name, &tensor.shape, tensor.dtype));
        assert!(read.offset.is_multiple_of(32));
        let len = tensor.bytes() as usize;
        assert_eq!(file.bytes(read.offset, len), content(&tensor.name, len));
    }
}

#[test]
fn a_staged_gguf_is_attached_under_the_names_of_the_files() {
    let tensors = tensors(&decoder(true).tensors());
    let staged = staged(&bytes(&metadata("qwen3"), &tensors)).unwrap();
    let attachment = attach(&staged).unwrap();
    assert_eq!(attachment.len(), staged.expected.len());
    for (index, tensor) in tensors.iter().enumerate() {
        let live = attachment.tensor(index);
        assert_eq!(live.read(), content(&tensor.name, live.bytes), "{}", live.name);
        assert_eq!((live.row_order, live.dtype), (RowOrder::AsFiles, tensor.dtype));
    }
    // A server's view: the file.
    attachment.find("model.layers.1.mlp.up_proj.weight").unwrap().write(2, &[1, 2]);
    let file = GgufFile::open(&staged.live.join(GGUF_FILE)).unwrap();
    let written = file.tensors().iter().find(|tensor| tensor.name == "blk.1.ffn_up.weight").unwrap();
    assert_eq!(file.bytes(written.offset + 2, 2), [1, 2]);
}

#[test]
fn queries_and_keys_of_llama_lie_interleaved() {
    let staged = staged(&bytes(&metadata("llama"), &tensors(&decoder(true).tensors()))).unwrap();
    let attachment = attach(&staged).unwrap();
    for index in 0..attachment.len() {
        let live = attachment.tensor(index);
        let rotated = [".q_proj.", ".k_proj."].iter().any(|module| live.name.contains(module));
        let want = if rotated { RowOrder::Interleaved { head_dim: 4 } } else { RowOrder::AsFiles };
        assert_eq!(live.row_order, want, "{}", live.name);
    }
}

#[test]
fn a_process_that_uses_a_staged_gguf_is_found() {
    let tensors = tensors(&decoder(true).tensors());
    let bytes = bytes(&metadata("qwen3"), &tensors);
    let staged = staged(&bytes).unwrap();
    let mut server = std::process::Command::new("tail");
    server.arg("-f").arg(staged.live.join(GGUF_FILE)).stdout(std::process::Stdio::null());
    let mut server = server.spawn().unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while ipc::servers_of(&staged.live).unwrap() != [server.id()] {
        assert!(std::time::Instant::now() < deadline, "the reader is not seen");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn tensors_that_are_not_the_models_are_refused_by_name() {
    let all = tensors(&decoder(true).tensors());
    let changed = |change: &dyn Fn(&mut Vec<NewTensor>)| {
        let mut tensors = all.clone();
        change(&mut tensors);
        let staged = staged(&bytes(&metadata("llama"), &tensors)).unwrap();
        attach(&staged).unwrap_err().to_string()
    };
    let error = changed(&|tensors| {
        tensors.retain(|tensor| tensor.name != "blk.1.attn_k.weight");
    });
    assert!(error.contains("model.layers.1.self_attn.k_proj.weight"), "{error}");
    let error = changed(&|tensors| tensors[1].name = "blk.0.ssm_in.weight".into());
    assert!(error.contains("blk.0.ssm_in.weight"), "{error}");
    let error = changed(&|tensors| tensors[2].shape.reverse());
    assert!(error.contains("blk.0.attn_k.weight") && error.contains("[8, 4]"), "{error}");
    let error = changed(&|tensors| tensors[0].shape[0] += 1);
    assert!(error.contains("token_embd.weight"), "{error}");
}

#[test]
fn heads_that_the_metadata_contradict_are_refused() {
    let tensors = tensors(&decoder(true).tensors());
    for (heads, named) in [(GgufValue::U32(8), "q_proj"), (GgufValue::i32s([2, 2]), "how long a head is")] {
        let mut metadata = metadata("llama");
        metadata[2].1 = heads;
        let error = attach(&staged(&bytes(&metadata, &tensors)).unwrap()).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

/// ggml's number of a type, written over that of the first tensor.
fn with_type(type_id: u32) -> Vec<u8> {
    let tensors = tensors(&decoder(true).tensors());
    let mut bytes = bytes(&metadata("qwen3"), &tensors);
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    // The name, two dimensions behind their number, the type.
    bytes[at + name.len() + 4 + 16..][..4].copy_from_slice(&type_id.to_le_bytes());
    bytes
}

#[test]
fn quantized_tensors_are_refused_by_name_and_type() {
    for (type_id, named) in [(2, "Q4_0"), (14, "Q6_K"), (39, "MXFP4"), (4, "number 4"), (9999, "number 9999")] {
        let error = staged(&with_type(type_id)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("token_embd.weight") && error.contains(named), "{error}");
        assert!(error.contains("--outtype"), "what to do: {error}");
    }
}

#[test]
fn a_header_that_ends_anywhere_is_refused() {
    let (metadata, tensors) = (metadata("qwen3"), tensors(&decoder(true).tensors()));
    let whole = bytes(&metadata, &tensors);
    let header = GgufLayout::new(&metadata, &tensors).header.len();
    for len in 0..header {
        let error = open(&whole[..len]).expect_err(&format!("{len} of {header} bytes"));
        assert!(matches!(error, Error::Gguf { .. } | Error::Io { .. }), "{len}: {error}");
    }
    let error = open(&whole[..whole.len() - 64]).unwrap_err().to_string();
    assert!(error.contains("truncated"), "{error}");
}

/// Every byte of the header takes hostile values: an answer, never a panic, and never much memory.
#[test]
fn hostile_headers_are_answered() {
    let (metadata, tensors) = (metadata("llama"), tensors(&decoder(true).tensors()));
    let whole = bytes(&metadata, &tensors);
    let header = GgufLayout::new(&metadata, &tensors).header.len();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    std::fs::write(&path, &whole).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    for at in 0..header {
        for hostile in [0u8, 0x7f, 0x80, 0xff] {
            file.write_all_at(&[hostile], at as u64).unwrap();
            if let Ok(read) = GgufFile::open(&path) {
                let _ = read.server_tensors();
            }
        }
        // And the eight bytes that may be a length, as large as they can be.
        let end = (at + 8).min(header);
        file.write_all_at(&vec![0xff; end - at], at as u64).unwrap();
        let _ = GgufFile::open(&path);
        file.write_all_at(&whole[at..end], at as u64).unwrap();
    }
    GgufFile::open(&path).unwrap();
}

#[test]
fn lies_are_refused_in_words() {
    let tensors = tensors(&decoder(true).tensors());
    let refused = |metadata: &[(String, GgufValue)], tensors: &[NewTensor]| {
        open(&bytes(metadata, tensors)).map(|_| ()).unwrap_err().to_string()
    };
    let mut twice = metadata("qwen3");
    twice.push(twice[3].clone());
    assert!(refused(&twice, &tensors).contains("`a.u8` comes twice"));
    let twice = [tensors.clone(), vec![tensors[2].clone()]].concat();
    assert!(refused(&metadata("qwen3"), &twice).contains("comes twice"));
    let mut parts = metadata("qwen3");
    parts.push(("split.count".into(), GgufValue::U16(3)));
    assert!(refused(&parts, &tensors).contains("3 parts"));
    let nested = GgufValue::Array(9, vec![GgufValue::i32s([1])]);
    assert!(refused(&[("a".into(), nested)], &tensors).contains("array of arrays"));

    let whole = bytes(&metadata("qwen3"), &tensors);
    let with = |at: usize, new: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..][..new.len()].copy_from_slice(new);
        open(&bytes).map(|_| ()).unwrap_err().to_string()
    };
    assert!(with(0, b"GGML").contains("no GGUF file"));
    assert!(with(4, &1u32.to_le_bytes()).contains("version 1"));
    assert!(with(4, &3u32.to_be_bytes()).contains("big-endian"));
    assert!(with(8, &u64::MAX.to_le_bytes()).contains("tensors"));
    assert!(with(16, &u64::MAX.to_le_bytes()).contains("metadata entries"));
}

#[test]
fn an_offset_outside_the_file_or_off_its_alignment_is_refused() {
    let tensors = tensors(&decoder(true).tensors());
    let whole = bytes(&metadata("qwen3"), &tensors);
    let name = b"token_embd.weight";
    let at = whole.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 16 + 4;
    for offset in [1u64, 16, u64::MAX, u64::MAX - 31, whole.len() as u64] {
        let mut bytes = whole.clone();
        bytes[at..][..8].copy_from_slice(&offset.to_le_bytes());
        let error = open(&bytes).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("token_embd.weight"), "{offset}: {error}");
    }
}

#[test]
fn staging_replaces_one_kind_of_weights_by_the_other() {
    let (dir, model, expected) = model(true);
    let live = dir.path().join("live");
    ipc::stage(&model, &live, &mut |_, _| {}).unwrap();
    let bytes = bytes(&metadata("qwen3"), &tensors(&expected));
    let write = |path: &Path| {
        std::fs::write(path, &bytes).unwrap();
        Ok::<_, Error>(())
    };
    let report = stage_gguf(&model, &live, bytes.len() as u64, write).unwrap();
    assert!(live.join(GGUF_FILE).exists() && !live.join("model.safetensors").exists());
    assert_eq!((report.tensors, report.files), (expected.len(), 3));
    ipc::stage(&model, &live, &mut |_, _| {}).unwrap();
    assert!(!live.join(GGUF_FILE).exists() && live.join("model.safetensors").exists());
    Attachment::open(&Source::Staged(live), &expected).unwrap();
}
