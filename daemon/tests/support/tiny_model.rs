//! A model directory without weights for tests of what reads only its texts: configuration, tokenizer, templates.
//! The tokenizer is byte-level BPE without merges: one token per byte, ids 0..256 in the alphabet's order, then the
//! special tokens.

use std::path::Path;

use serde_json::json;

/// ChatML as Qwen's templates write it, without tools.
pub const CHATML: &str = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// `<|endoftext|>`
pub const ENDOFTEXT: u32 = 256;
/// `<|im_start|>`
pub const IM_START: u32 = 257;
/// `<|im_end|>`
pub const IM_END: u32 = 258;

/// The characters that byte-level BPE writes for the bytes 0..256.
fn byte_alphabet() -> Vec<char> {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut moved = 0;
    (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                moved += 1;
                255 + moved
            };
            char::from_u32(code).unwrap()
        })
        .collect()
}

/// Writes config.json, generation_config.json, tokenizer.json and tokenizer_config.json into `dir`.
pub fn write(dir: &Path, chat_template: &str) {
    let mut vocab = serde_json::Map::new();
    for (id, c) in byte_alphabet().into_iter().enumerate() {
        vocab.insert(c.to_string(), json!(id));
    }
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let files = [
        (
            "tokenizer.json",
            json!({
                "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
                "added_tokens": [special(ENDOFTEXT, "<|endoftext|>"), special(IM_START, "<|im_start|>"),
                                 special(IM_END, "<|im_end|>")],
                "pre_tokenizer": byte_level, "decoder": byte_level,
                "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                          "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                          "ignore_merges": false, "vocab": vocab, "merges": []}
            }),
        ),
        ("tokenizer_config.json", json!({"eos_token": "<|im_end|>", "chat_template": chat_template})),
        ("config.json", json!({"vocab_size": 259, "eos_token_id": IM_END})),
        ("generation_config.json", json!({"eos_token_id": [IM_END, ENDOFTEXT]})),
    ];
    for (name, content) in files {
        std::fs::write(dir.join(name), content.to_string()).unwrap();
    }
}
