//! Writing a GGUF file: the header, and where each tensor's data then go.

use super::{ALIGNMENT, ALIGNMENT_KEY, GgufValue, MAGIC, type_of};
use weight_map::Dtype;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTensor {
    /// Name as llama.cpp spells it.
    pub name: String,
    /// Shape as the safetensors files have it: (rows, cols) or (n,).
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
}

/// The header of a file that is to be written, and its places.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufLayout {
    /// The header, padded to where the data begin.
    pub header: Vec<u8>,
    /// First byte of each tensor, from the start of the file, in order; the bytes between tensors are zero.
    pub offsets: Vec<u64>,
    /// Size of the file.
    pub bytes: u64,
}

impl NewTensor {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }
}

impl GgufLayout {
    /// Lays out a file with these metadata and tensors. An alignment among the metadata is left out: data are
    /// aligned to the format's own 32 bytes.
    pub fn new(metadata: &[(String, GgufValue)], tensors: &[NewTensor]) -> GgufLayout {
        let metadata: Vec<_> = metadata.iter().filter(|(key, _)| key != ALIGNMENT_KEY).collect();
        let mut header = MAGIC.to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            push_string(&mut header, key.as_bytes());
            header.extend(value.type_id().to_le_bytes());
            push_value(&mut header, value);
        }
        let (mut offsets, mut at) = (Vec::with_capacity(tensors.len()), 0u64);
        for tensor in tensors {
            at = at.next_multiple_of(ALIGNMENT);
            push_string(&mut header, tensor.name.as_bytes());
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|n| header.extend((*n as u64).to_le_bytes()));
            header.extend(type_of(tensor.dtype).to_le_bytes());
            header.extend(at.to_le_bytes());
            offsets.push(at);
            at += tensor.bytes();
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let data_start = header.len() as u64;
        offsets.iter_mut().for_each(|offset| *offset += data_start);
        // llama.cpp wants the last tensor padded too.
        GgufLayout { header, offsets, bytes: data_start + at.next_multiple_of(ALIGNMENT) }
    }
}

fn push_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

fn push_value(out: &mut Vec<u8>, value: &GgufValue) {
    match value {
        GgufValue::U8(v) => out.extend(v.to_le_bytes()),
        GgufValue::I8(v) => out.extend(v.to_le_bytes()),
        GgufValue::U16(v) => out.extend(v.to_le_bytes()),
        GgufValue::I16(v) => out.extend(v.to_le_bytes()),
        GgufValue::U32(v) => out.extend(v.to_le_bytes()),
        GgufValue::I32(v) => out.extend(v.to_le_bytes()),
        GgufValue::F32(v) => out.extend(v.to_le_bytes()),
        GgufValue::Bool(v) => out.push((*v).into()),
        GgufValue::String(text) => push_string(out, text),
        GgufValue::Array(of, values) => {
            out.extend(of.to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| push_value(out, value));
        }
        GgufValue::U64(v) => out.extend(v.to_le_bytes()),
        GgufValue::I64(v) => out.extend(v.to_le_bytes()),
        GgufValue::F64(v) => out.extend(v.to_le_bytes()),
    }
}
