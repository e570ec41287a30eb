//! Headers of safetensors files and the index of several, as `ipc` reads what a server maps and `checkpoint` what it
//! writes to. What both accept they must understand alike.

use std::path::Path;

use super::{framed, with_folder, write};
use crate::Target;

const WORDS: &[&str] = &[
    "\"dtype\":\"F32\"",
    "\"shape\":[",
    "\"data_offsets\":[",
    "\"__metadata__\":{",
    "\"BF16\"",
    "\"F4\"",
    "\"U8\"",
    "18446744073709551615",
    "4294967296",
    "[0,0]",
];

/// One file.
pub const SHARD: Target = Target {
    name: "safetensors",
    accepts: |input| {
        with_folder(|folder| {
            write(folder, "model.safetensors", &framed(&[], input));
            read(folder)
        })
    },
    seeds: || {
        [
            &b"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[0,8]},\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\
               \"data_offsets\":[8,14]},\"__metadata__\":{\"format\":\"pt\"}}\0fourteen bytes"[..],
            b"{\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[],\"data_offsets\":[0,1]}}\0.",
            b"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,0],\"data_offsets\":[0,0]}}\0",
            b"{}\0",
            b"\x02\0\0\0\0\0\0\0{}",
        ]
        .map(<[u8]>::to_vec)
        .into()
    },
    words: WORDS,
};

/// The index of two files.
pub const INDEX: Target = Target {
    name: "safetensors_index",
    accepts: |input| {
        with_folder(|folder| {
            for name in ["a", "b"] {
                let header = format!("{{\"{name}\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}}}\0....");
                write(folder, &format!("{name}.safetensors"), &framed(&[], header.as_bytes()));
            }
            write(folder, "model.safetensors.index.json", input);
            read(folder)
        })
    },
    seeds: || {
        vec![
            br#"{"metadata":{"total_size":8},"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}"#.to_vec(),
            br#"{"weight_map":{"a":"a.safetensors"}}"#.to_vec(),
        ]
    },
    words: &["\"weight_map\":{", "\"a\":\"a.safetensors\"", "../", "\"\"", "/dev/null", "."],
};

type Row = (String, Vec<usize>, u64, u64);

/// Both readers on a directory. Returns whether both accept it.
fn read(folder: &Path) -> bool {
    let mapped = ipc::SafetensorsDir::open(folder).map(|dir| {
        let _ = dir.server_tensors();
        let row = |t: &ipc::FileTensor| {
            assert_eq!(dir.bytes(&t.name).expect("it is there").len() as u64, t.bytes, "{}", t.name);
            (t.name.clone(), t.shape.clone(), t.offset, t.bytes)
        };
        sorted(dir.tensors().iter().map(row))
    });
    let written = checkpoint::Checkpoint::open(folder).map(|(open, _)| {
        assert!(open.verify().is_ok_and(|report| report.is_ok()), "what was just opened is not whole");
        sorted(open.current().tensors.iter().map(|t| (t.name.clone(), t.shape.clone(), t.offset, t.bytes)))
    });
    match (mapped, written) {
        (Ok(mapped), Ok(written)) => {
            assert_eq!(mapped, written, "two readers of one file");
            true
        }
        _ => false,
    }
}

fn sorted(rows: impl Iterator<Item = Row>) -> Vec<Row> {
    let mut rows: Vec<Row> = rows.collect();
    rows.sort();
    rows
}
