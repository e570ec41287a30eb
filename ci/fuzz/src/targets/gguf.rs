//! GGUF files, and a tokenizer's files, from which metadata of one are made.

use std::fs::File;
use std::path::Path;

use apollod::gguf::tokenizer_metadata;
use ipc::{GgufFile, GgufLayout, GgufValue, NewTensor};
use model::Config;
use weight_map::Dtype;

use super::{join, parts, with_folder, write};
use crate::Target;

/// What the tokenizer must fit.
const CONFIG: &str = r#"{"architectures":["Qwen3ForCausalLM"],"hidden_size":8,"num_attention_heads":2,"head_dim":4,
    "intermediate_size":8,"num_hidden_layers":1,"vocab_size":6}"#;

/// A file. What can be read is written anew, and must read as the same.
pub const FILE: Target = Target {
    name: "gguf",
    accepts: |input| {
        with_folder(|folder| {
            write(folder, "model.gguf", input);
            let Ok(file) = GgufFile::open(&folder.join("model.gguf")) else { return false };
            let Ok(server) = file.server_tensors() else { return true };
            let new = |(t, s): (&ipc::GgufTensor, &weight_map::ServerTensor)| {
                assert_eq!(file.bytes(t.offset, t.shape.iter().product::<usize>() * s.dtype.size()).len() % 2, 0);
                NewTensor { name: t.name.clone(), shape: t.shape.clone(), dtype: s.dtype }
            };
            let tensors: Vec<NewTensor> = file.tensors().iter().zip(&server).map(new).collect();
            again(folder, file.metadata(), &tensors);
            true
        })
    },
    seeds: || {
        let text = GgufValue::string;
        let metadata = [
            ("general.architecture", text("llama")),
            ("llama.attention.key_length", GgufValue::U32(4)),
            ("small", GgufValue::U8(1)),
            ("signed", GgufValue::I64(-1)),
            ("real", GgufValue::F64(0.5)),
            ("flag", GgufValue::Bool(true)),
            ("tokenizer.ggml.tokens", GgufValue::strings(["a", "b"])),
            ("tokenizer.ggml.token_type", GgufValue::i32s([1, 3])),
        ]
        .map(|(key, value)| (key.to_owned(), value));
        let tensor = |name: &str, shape: &[usize], dtype| NewTensor { name: name.into(), shape: shape.into(), dtype };
        let tensors = [
            tensor("token_embd.weight", &[6, 4], Dtype::F32),
            tensor("blk.0.attn_q.weight", &[8, 4], Dtype::BF16),
            tensor("output_norm.weight", &[4], Dtype::F16),
        ];
        vec![file_of(&metadata, &tensors), file_of(&[], &tensors[..1]), file_of(&metadata[..1], &[])]
    },
    words: &["GGUF", "general.architecture", "general.alignment", "split.count", "llama"],
};

/// tokenizer.json and tokenizer_config.json.
pub const TOKENIZER: Target = Target {
    name: "gguf_tokenizer",
    accepts: |input| {
        with_folder(|folder| {
            let [tokenizer, settings, template] = parts(input);
            write(folder, "config.json", CONFIG.as_bytes());
            write(folder, "tokenizer.json", tokenizer);
            write(folder, "tokenizer_config.json", settings);
            if !template.is_empty() {
                write(folder, "chat_template.jinja", template);
            }
            let config = Config::parse(CONFIG).expect("a config that is known");
            let Ok(metadata) = tokenizer_metadata(folder, &config) else { return false };
            again(folder, &metadata, &[]);
            true
        })
    },
    seeds: || {
        let tokenizer = |pre: &str| {
            format!(
                r#"{{"added_tokens":[{{"id":4,"content":"<|end|>","special":true}}],"normalizer":{{"type":"NFC"}},
                "pre_tokenizer":{pre},"post_processor":{{"type":"TemplateProcessing","single":[
                {{"SpecialToken":{{"id":"<|end|>"}}}},{{"Sequence":{{"id":"A"}}}}]}},
                "model":{{"type":"BPE","vocab":{{"a":0,"b":1,"ab":2}},"merges":["a b",["ab","a"]]}}}}"#
            )
        };
        let settings = br#"{"eos_token":"<|end|>","pad_token":{"content":"a"},"chat_template":[{"name":"default","template":"x"}]}"#;
        let digits =
            r#"{"type":"Sequence","pretokenizers":[{"type":"Digits","individual_digits":true},{"type":"ByteLevel"}]}"#;
        let split = r#"{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"x"},"behavior":"Isolated"},{"type":"ByteLevel","use_regex":false}]}"#;
        vec![
            join(&[tokenizer(r#"{"type":"ByteLevel","add_prefix_space":false}"#).as_bytes(), settings]),
            join(&[tokenizer(digits).as_bytes(), br#"{"add_bos_token":true}"#, b"{{ messages }}"]),
            join(&[tokenizer(split).as_bytes(), b"{}"]),
        ]
    },
    words: &[
        "\"pretokenizers\":[",
        "\"normalizers\":[",
        "\"processors\":[",
        "\"ByteLevel\"",
        "\"use_regex\":false",
        "\"ignore_merges\":true",
        "\"byte_fallback\":true",
        "\"vocab\":{",
        "\"merges\":[",
        "\"single\":[",
        "null",
        "[]",
    ],
};

fn file_of(metadata: &[(String, GgufValue)], tensors: &[NewTensor]) -> Vec<u8> {
    let layout = GgufLayout::new(metadata, tensors);
    let mut file = layout.header;
    file.resize(layout.bytes as usize, 0);
    file
}

/// Writes a file with these contents and reads it.
fn again(folder: &Path, metadata: &[(String, GgufValue)], tensors: &[NewTensor]) {
    let layout = GgufLayout::new(metadata, tensors);
    let path = folder.join("again.gguf");
    write(folder, "again.gguf", &layout.header);
    let file = File::options().write(true).open(&path).expect("it was just written");
    file.set_len(layout.bytes).expect("a temporary file can grow");
    let read = GgufFile::open(&path).unwrap_or_else(|error| panic!("what was written is refused: {error}"));
    let kept = metadata.iter().filter(|(key, _)| key != "general.alignment");
    assert!(kept.map(bits).eq(read.metadata().iter().map(bits)), "metadata");
    let shapes = read.tensors().iter().map(|t| (&t.name, &t.shape, t.offset));
    assert!(tensors.iter().zip(&layout.offsets).map(|(t, o)| (&t.name, &t.shape, *o)).eq(shapes), "tensors");
}

/// Equal where bits are: NaN too.
fn bits((key, value): &(String, GgufValue)) -> String {
    match value {
        GgufValue::F32(v) => format!("{key} f32 {:x}", v.to_bits()),
        GgufValue::F64(v) => format!("{key} f64 {:x}", v.to_bits()),
        GgufValue::Array(6, values) | GgufValue::Array(12, values) => {
            values.iter().map(|value| bits(&(key.clone(), value.clone()))).collect()
        }
        other => format!("{key} {other:?}"),
    }
}
