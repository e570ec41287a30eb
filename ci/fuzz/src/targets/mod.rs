//! The targets, a file for each kind of input.

mod attach;
mod config;
mod examples;
mod generations;
mod gguf;
mod optimizer_state;
mod requests;
mod safetensors;

use std::path::Path;

use crate::Target;

/// All of them.
pub static TARGETS: &[Target] = &[
    safetensors::SHARD,
    safetensors::INDEX,
    gguf::FILE,
    gguf::TOKENIZER,
    attach::MANIFEST,
    attach::ATTACH,
    optimizer_state::STATE,
    generations::GENERATIONS,
    examples::EXAMPLES,
    examples::TEMPLATE,
    requests::JOB,
    requests::PROMPT,
    config::SETTINGS,
    config::MODEL,
];

/// A folder of this thread's own that every input finds empty. ci/fuzz.py lets it be on tmpfs.
fn with_folder<T>(run: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().expect("there is a folder for temporary files");
    run(folder.path())
}

fn write(folder: &Path, name: &str, bytes: &[u8]) {
    std::fs::write(folder.join(name), bytes).expect("a temporary file can be written");
}

/// The input's parts, which NUL separates: as many as are asked for, the last with whatever is left.
fn parts<const N: usize>(input: &[u8]) -> [&[u8]; N] {
    let mut parts = input.splitn(N, |byte| *byte == 0);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&0)
}

/// A file that begins with the length of its JSON: the input itself, or from an input that begins with a brace, JSON and
/// what follows it after a NUL, the length put before it. So a mutation need not hit the length to reach what follows.
fn framed(magic: &[u8], input: &[u8]) -> Vec<u8> {
    if input.first() != Some(&b'{') {
        return input.to_vec();
    }
    let [json, rest] = parts(input);
    [magic, &(json.len() as u64).to_le_bytes(), json, rest].concat()
}
