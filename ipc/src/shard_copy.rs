//! Copies safetensors files, with some tensors left out.
//!
//! A file that keeps all its tensors keeps its header byte for byte. One that loses some gets a header with
//! the later offsets moved up, padded with spaces to a multiple of 8 as the format's own writer does.

use crate::safetensors_dir::{FileTensor, Shard};
use crate::stage::part_of;
use crate::{Error, SafetensorsDir};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes copied between two calls of the progress function.
const COPY_BYTES: usize = 4 << 20;

/// Copies every file of `source` to `live_dir` without the tensors in `left_out`; a file that would be
/// empty is not made. `progress` gets the bytes of weights done and in all.
pub(crate) fn copy_weights(
    source: &SafetensorsDir,
    live_dir: &Path,
    left_out: &[String],
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), Error> {
    let keeps = |tensor: &&FileTensor| !left_out.contains(&tensor.name);
    let total: u64 = source.in_files().iter().filter(keeps).map(|tensor| tensor.bytes).sum();
    let mut done = 0;
    progress(done, total);
    for (index, shard) in source.shards().iter().enumerate() {
        let held: Vec<&FileTensor> = source.in_files().iter().filter(|tensor| tensor.shard == index).collect();
        let kept: Vec<&FileTensor> = held.iter().copied().filter(keeps).collect();
        if kept.is_empty() {
            continue;
        }
        let mut header = shard.header()?;
        if kept.len() < held.len() {
            header = rebuilt_header(shard, &header, &kept, left_out)?;
        }
        let path = live_dir.join(&shard.file_name);
        write_shard(shard, &header, &kept, &path, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?;
    }
    Ok(())
}

fn write_shard(
    shard: &Shard,
    header: &[u8],
    kept: &[&FileTensor],
    path: &Path,
    wrote: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let part = part_of(path);
    let write = |source| Error::io("write", &part, source);
    let mut out = File::create(&part).map_err(write)?;
    out.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| out.write_all(header)).map_err(write)?;
    let mut buffer = vec![0; COPY_BYTES];
    for tensor in kept {
        let mut at = 0;
        while at < tensor.bytes {
            let length = (tensor.bytes - at).min(COPY_BYTES as u64) as usize;
            let piece = &mut buffer[..length];
            shard
                .file()
                .read_exact_at(piece, tensor.offset + at)
                .map_err(|source| Error::io("read", &shard.path, source))?;
            out.write_all(piece).map_err(write)?;
            at += length as u64;
            wrote(length as u64);
        }
    }
    fs::rename(&part, path).map_err(|source| Error::io("rename to", path, source))
}

fn rebuilt_header(shard: &Shard, header: &[u8], kept: &[&FileTensor], left_out: &[String]) -> Result<Vec<u8>, Error> {
    let damaged = |reason: String| Error::Safetensors { path: shard.path.clone(), reason };
    let mut json: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(|error| damaged(error.to_string()))?;
    for name in left_out {
        json.shift_remove(name);
    }
    let mut at = 0;
    for tensor in kept {
        let entry = json.get_mut(&tensor.name).ok_or_else(|| damaged(format!("`{}` has gone", tensor.name)))?;
        entry["data_offsets"] = serde_json::json!([at, at + tensor.bytes]);
        at += tensor.bytes;
    }
    let mut text = serde_json::to_vec(&json).expect("a parsed value can be written");
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok(text)
}
