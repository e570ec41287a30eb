//! What a server says of its weights: the manifest, by itself and on the three ways in; and a server's answers.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use ipc::{Attachment, Invalidation, Manifest, Source};
use weight_map::{HfTensor, Role};

use super::{framed, join, parts, with_folder, write};
use crate::Target;

/// A document in which `@PID`, `@MODEL` and `@WEIGHTS` stand for what is true here.
const MANIFEST_OF_FILE: &str = r#"{"version":1,"epoch":"00112233445566778899aabbccddeeff","pid":@PID,"model_dir":"@MODEL","rank":0,"world_size":1,"allocations":[{"kind":"file","path":"@WEIGHTS","bytes":64}],"tensors":[{"name":"model.w.weight","dtype":"bfloat16","shape":[2,4],"strides":[4,1],"allocation":0,"offset":16},{"name":"model.n.weight","dtype":"F32","shape":[4],"strides":[1],"allocation":0,"offset":32}],"server":{"name":"x","version":"1"},"controls":["invalidate","hold","score"]}"#;
const MERGED: &str = r#"{"version":1,"epoch":"00112233445566778899aabbccddeeff","pid":@PID,"model_dir":"@MODEL","rank":0,"world_size":1,"allocations":[{"kind":"file","path":"@WEIGHTS","bytes":64,"writable_by":"trainer"}],"tensors":[{"name":"model.all.weight","dtype":"BF16","shape":[2,4],"strides":[4,1],"allocation":0,"offset":0},{"name":"model.n.weight","dtype":"F32","shape":[4],"strides":[1],"allocation":0,"offset":32}],"packing":[{"merged":"model.all.weight","parts":["model.w.weight"]}]}"#;
const CUDA: &str = r#"{"version":1,"epoch":"00112233445566778899aabbccddeeff","pid":1,"model_dir":"/m","rank":0,"world_size":1,"allocations":[{"kind":"cuda_ipc","handle":"00000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000","bytes":2097152,"device":"GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"}],"tensors":[]}"#;
const MARKER: &str = r#"{"version":1,"model_dir":"@MODEL","epoch":"00112233445566778899aabbccddeeff","complete":true}"#;
const STAGED: &[u8] = b"{\"model.w.weight\":{\"dtype\":\"BF16\",\"shape\":[2,4],\"data_offsets\":[0,16]},\
    \"model.n.weight\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,32]}}  \x000123456789abcdef0123456789abcdef";
const WORDS: &[&str] = &[
    "\"allocations\":[",
    "\"kind\":\"file\"",
    "\"kind\":\"cuda_ipc\"",
    "\"tensors\":[",
    "\"strides\":[",
    "\"packing\":[{\"merged\":\"",
    "\"parts\":[",
    "\"offset\":18446744073709551615",
    "4294967296",
    "@PID",
    "@MODEL",
    "@WEIGHTS",
    "\"controls\":[",
    "{\"error\":\"no\"}",
    "{\"pong\":7,\"epoch\":\"",
    "{\"invalidated\":\"reset\"}",
    "{\"held\":true}",
    "{\"released\":false}",
    "{\"logprobs\":[",
];

/// The document. What can be read is written, and must read as the same.
pub const MANIFEST: Target = Target {
    name: "manifest",
    accepts: |input| {
        let text =
            String::from_utf8_lossy(input).replace("@PID", "7").replace("@MODEL", "/m").replace("@WEIGHTS", "/w");
        let Ok(manifest) = Manifest::parse(text.as_bytes()) else { return false };
        let server = manifest.server_tensors().expect("a valid manifest has element types that are known");
        let _ = weight_map::map(&expected(), &server, &manifest.packing);
        let written = serde_json::to_vec(&manifest).expect("a manifest is plain data");
        assert_eq!(Manifest::parse(&written).expect("what was written is refused"), manifest);
        true
    },
    seeds: || [MANIFEST_OF_FILE, MERGED, CUDA].map(|text| text.as_bytes().to_vec()).into(),
    words: WORDS,
};

/// The ways in, by the first byte: `l`, a live copy's marker and file; `m`, a manifest in a file; `s`, what a server
/// says on its socket, from its greeting on.
pub const ATTACH: Target = Target {
    name: "attach",
    accepts: |input| {
        let Some((way, said)) = input.split_first() else { return false };
        with_folder(|folder| {
            let place = Place::new(folder);
            match way {
                b'l' => place.live(said),
                b'm' => place.manifest(said),
                b's' => place.socket(said),
                _ => false,
            }
        })
    },
    seeds: || {
        let gguf = |metadata: &[u8]| join(&[&[b"l", MARKER.as_bytes()].concat(), metadata]);
        let by = |way: &str, text: &str| format!("{way}{text}").into_bytes();
        let answers = "{\"pong\":1,\"epoch\":\"00112233445566778899aabbccddeeff\"}\n{\"invalidated\":\"salt\"}\n\
                       {\"held\":true}\n{\"released\":true}\n{\"logprobs\":[-1.0,-2.5]}\n";
        vec![
            by("m", MANIFEST_OF_FILE),
            by("m", MERGED),
            gguf(STAGED),
            gguf(b"GGUF\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            by("s", &format!("{MANIFEST_OF_FILE}\n{answers}")),
            by("s", "{\"error\":\"leased by pid 4711\"}\n"),
        ]
    },
    words: WORDS,
};

fn expected() -> Vec<HfTensor> {
    let tensor = |name: &str, shape: &[usize], role| HfTensor { name: name.into(), shape: shape.into(), role };
    vec![tensor("model.w.weight", &[2, 4], Role::Matrix), tensor("model.n.weight", &[4], Role::Norm)]
}

/// A model directory, and weights that this process holds.
struct Place<'a> {
    folder: &'a Path,
    _weights: File,
}

impl Place<'_> {
    fn new(folder: &Path) -> Place<'_> {
        std::fs::create_dir_all(folder.join("model")).expect("a temporary folder can be made");
        write(folder, "weights", &[1; 64]);
        let weights = File::open(folder.join("weights")).expect("it was just written");
        Place { folder, _weights: weights }
    }

    fn said(&self, text: &[u8]) -> String {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let text = String::from_utf8_lossy(text).replace("@PID", &std::process::id().to_string());
        text.replace("@MODEL", &path("model")).replace("@WEIGHTS", &path("weights"))
    }

    fn live(&self, said: &[u8]) -> bool {
        let live = self.folder.join("live");
        std::fs::create_dir_all(&live).expect("a temporary folder can be made");
        let [marker, weights] = parts(said);
        write(&live, ipc::STAGE_MARKER, self.said(marker).as_bytes());
        if weights.starts_with(b"GGUF") {
            write(&live, ipc::GGUF_FILE, weights);
        } else {
            write(&live, "model.safetensors", &framed(&[], weights));
        }
        attached(&Source::Staged(live)).is_some()
    }

    fn manifest(&self, said: &[u8]) -> bool {
        write(self.folder, "manifest.json", self.said(said).as_bytes());
        attached(&Source::Manifest(self.folder.join("manifest.json"))).is_some()
    }

    fn socket(&self, said: &[u8]) -> bool {
        let path = self.folder.join("socket");
        let listener = UnixListener::bind(&path).expect("a temporary socket can be made");
        let said = self.said(said);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let (mut stream, _) = listener.accept().expect("the trainer connects");
                // One line for each of the trainer's, and the rest at its last.
                for line in said.split_inclusive('\n') {
                    let mut asked = String::new();
                    let come = BufReader::new(&stream).read_line(&mut asked);
                    if !matches!(come, Ok(1..)) || stream.write_all(line.as_bytes()).is_err() {
                        break;
                    }
                }
            });
            let Some(attachment) = attached(&Source::Socket(path)) else { return false };
            let patience = Duration::from_secs(5);
            let _ = attachment.ping(patience);
            let _ = attachment.invalidate(Invalidation::Reset);
            let _ = attachment.hold(Duration::from_millis(10)).map(ipc::Hold::release);
            let _ = attachment.score(&[1, 2, 3]);
            true
        })
    }
}

/// Attaches, and touches every byte.
fn attached(source: &Source) -> Option<Attachment> {
    let attachment = Attachment::open(source, &expected()).ok()?;
    for index in 0..attachment.len() {
        let tensor = attachment.tensor(index);
        let bytes = tensor.read();
        tensor.write(0, &bytes);
    }
    Some(attachment)
}
