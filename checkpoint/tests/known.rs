//! Live weights of which it is known what may differ, by their hashes or by who writes them: what is read, and that
//! nothing is missed.

mod common;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use checkpoint::{Checkpoint, LiveTensor, LiveWeights, Part, Progress, Reads};
use common::*;

/// Weights that count what is read of them, and check that it is what was announced.
struct Device {
    live: Live,
    read: AtomicU64,
    scans: AtomicU32,
    announced: Mutex<std::vec::IntoIter<Part>>,
    /// What was written since the last sync; none for weights that are hashed.
    written: Option<Vec<Vec<Range<u64>>>>,
}

impl Device {
    fn of(live: Live) -> Device {
        Device { live, read: AtomicU64::new(0), scans: AtomicU32::new(0), announced: Mutex::default(), written: None }
    }

    /// Weights without hashes.
    fn written(live: Live) -> Device {
        let nothing = vec![Vec::new(); live.bytes.len()];
        Device { written: Some(nothing), ..Device::of(live) }
    }

    /// Flips bits of a byte.
    fn write(&mut self, tensor: usize, at: usize, bits: u8) {
        self.live.bytes[tensor][at] ^= bits;
        if let Some(written) = &mut self.written {
            written[tensor].push(at as u64..at as u64 + 1);
        }
    }

    /// Bytes read since the last call.
    fn taken(&self) -> u64 {
        if self.written.is_none() {
            assert_eq!(self.announced.lock().unwrap().next(), None, "announced and not read");
        }
        self.read.swap(0, Relaxed)
    }

    fn bytes(&self) -> u64 {
        self.live.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    fn sync(&mut self, checkpoint: &mut Checkpoint, cursor: u64) -> checkpoint::Result<checkpoint::SyncReport> {
        let done =
            checkpoint.sync(self, &mut |out| out.write_all(&state_of(cursor)), progress(cursor), &mut |_, _| {})?;
        self.written.iter_mut().flatten().for_each(Vec::clear);
        Ok(done)
    }
}

impl LiveWeights for Device {
    fn tensors(&self) -> &[LiveTensor] {
        &self.live.tensors
    }

    fn read(&self, tensor: usize, offset: u64, buf: &mut [u8]) {
        let part = Part { tensor, offset, bytes: buf.len() as u64 };
        assert!(part.bytes <= 1 << 20);
        let mut announced = self.announced.lock().unwrap();
        if self.written.is_none() {
            assert_eq!(announced.next(), Some(part), "read and not announced");
        } else {
            let holds = |whole: &Part| {
                let (start, end) = (whole.offset, whole.offset + whole.bytes);
                whole.tensor == tensor && start <= offset && offset + part.bytes <= end
            };
            assert!(announced.as_slice().iter().any(holds), "read and not announced: {part:?}");
        }
        drop(announced);
        self.read.fetch_add(part.bytes, Relaxed);
        self.live.read(tensor, offset, buf);
    }

    fn block_hashes(&self, block_bytes: u64) -> Option<Vec<u128>> {
        if self.written.is_some() {
            return None;
        }
        self.scans.fetch_add(1, Relaxed);
        let hash = |block: &[u8]| {
            let (first, _) = blake3::hash(block).as_bytes().split_first_chunk().map(|(f, r)| (*f, r.len())).unwrap();
            u128::from_le_bytes(first)
        };
        Some(self.live.bytes.iter().flat_map(|bytes| bytes.chunks(block_bytes as usize).map(hash)).collect())
    }

    fn announce(&self, parts: Vec<Part>) -> Reads {
        *self.announced.lock().unwrap() = parts.into_iter();
        match self.written {
            Some(_) => Reads::Anyhow,
            None => Reads::InOrder,
        }
    }

    fn written(&self) -> Option<Vec<Vec<Range<u64>>>> {
        self.written.clone()
    }
}

#[test]
fn only_blocks_whose_hash_changed_are_read() {
    for (sharded, pad) in [(false, 0), (true, 3)] {
        let dir = tempfile::tempdir().unwrap();
        let mut device = Device::of(make_model(dir.path(), sharded, pad, 1));
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        device.sync(&mut checkpoint, 1).unwrap();
        assert_eq!(device.taken(), device.bytes(), "nothing is known before the first sync");
        let idle = device.sync(&mut checkpoint, 2).unwrap();
        assert_eq!((device.taken(), idle.blocks_changed, idle.generation), (0, 0, 2));

        device.live.bytes[0][300_000] ^= 1;
        let one = device.sync(&mut checkpoint, 3).unwrap();
        assert_eq!((device.taken(), one.blocks_changed), (4096, 1));
        // The last block of a tensor is shorter.
        let norm = device.live.index("model.norm.weight");
        device.live.bytes[norm][153] ^= 1;
        device.sync(&mut checkpoint, 4).unwrap();
        assert_eq!(device.taken(), 154);
        assert_files_are(&checkpoint, &device.live);
        assert_eq!(device.scans.load(Relaxed), 4, "one scan for a sync");
    }
}

#[test]
fn no_changed_byte_is_missed_whatever_happens_in_between() {
    let seed = 0x5eed;
    println!("seed {seed:#x}");
    let mut rng = Rng(seed);
    for (sharded, pad, kind) in [(false, 1, 0), (true, 0, 0), (false, 1, 1), (true, 0, 1)] {
        let dir = tempfile::tempdir().unwrap();
        let mut device =
            [Device::of as fn(Live) -> Device, Device::written][kind](make_model(dir.path(), sharded, pad, seed));
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        let mut all = 0;
        for cursor in 1..=40 {
            for _ in 0..rng.below(6) {
                let tensor = rng.below(device.live.bytes.len());
                let at = rng.below(device.live.bytes[tensor].len());
                device.write(tensor, at, 1 << rng.below(8));
            }
            match rng.below(8) {
                // Fails, and the same weights are synced again.
                0 => {
                    let full = &mut |_: &mut dyn std::io::Write| Err(no_space());
                    checkpoint.sync(&device, full, progress(cursor), &mut |_, _| {}).unwrap_err();
                    *device.announced.lock().unwrap() = Vec::new().into_iter();
                    device.read.store(0, Relaxed);
                }
                // The files go back and live weights follow, as a trainer does it.
                1 if checkpoint.current().generation > 0 => {
                    checkpoint.rollback(checkpoint.current().generation - 1).unwrap();
                    for (tensor, bytes) in device.live.tensors.iter().zip(&mut device.live.bytes) {
                        checkpoint.read_tensor(&tensor.name, 0, bytes).unwrap();
                    }
                }
                // The files go back and live weights stay where they are.
                2 if checkpoint.current().generation > 0 => {
                    checkpoint.rollback(checkpoint.current().generation - 1).unwrap();
                }
                3 => drop(checkpoint.adopt(progress(cursor)).unwrap().generation),
                4 => {
                    drop(checkpoint);
                    checkpoint = Checkpoint::open(dir.path()).unwrap().0;
                }
                _ => {}
            }
            device.sync(&mut checkpoint, cursor).unwrap();
            all += device.taken();
            assert_files_are(&checkpoint, &device.live);
        }
        assert!(all < 30 * device.bytes(), "{all} bytes were read: what is known was of no use");
    }
}

#[test]
fn weights_that_are_known_to_equal_the_files_are_not_read_at_the_first_sync() {
    for kind in [Device::of as fn(Live) -> Device, Device::written] {
        let dir = tempfile::tempdir().unwrap();
        let mut device = kind(make_model(dir.path(), false, 0, 2));
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        checkpoint.assume_equal(&device);
        device.write(0, 5000, 1);
        device.sync(&mut checkpoint, 1).unwrap();
        assert_eq!(device.taken(), 4096);
        assert_files_are(&checkpoint, &device.live);

        // A rollback makes it untrue, whether live weights follow or not.
        checkpoint.rollback(0).unwrap();
        device.sync(&mut checkpoint, 2).unwrap();
        assert_eq!(device.taken(), device.bytes());
        assert_files_are(&checkpoint, &device.live);
    }
}

#[test]
fn other_trained_tensors_are_read_in_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = Device::of(make_model(dir.path(), false, 0, 3));
    let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
    device.sync(&mut checkpoint, 1).unwrap();
    device.taken();
    device.live.tensors.remove(1);
    device.live.bytes.remove(1);
    device.live.bytes[1][0] ^= 1;
    device.sync(&mut checkpoint, 2).unwrap();
    assert_eq!(device.taken(), device.bytes());
    device.sync(&mut checkpoint, 3).unwrap();
    assert_eq!(device.taken(), 0);
}

#[test]
fn damage_in_files_that_are_not_read_never_becomes_the_truth() {
    for kind in [Device::of as fn(Live) -> Device, Device::written] {
        let dir = tempfile::tempdir().unwrap();
        let mut device = kind(make_model(dir.path(), false, 0, 4));
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        device.sync(&mut checkpoint, 1).unwrap();
        device.taken();
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 2000;
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        device.sync(&mut checkpoint, 2).unwrap();
        let report = checkpoint.verify().unwrap();
        assert!(report.to_string().contains("lookup"), "{report}");
        // A block beside it is read, and the sync refused.
        let lookup = device.live.index("lookup");
        (0..device.live.bytes[lookup].len()).for_each(|at| device.write(lookup, at, 2));
        let error = device.sync(&mut checkpoint, 3).unwrap_err();
        assert!(matches!(error, checkpoint::Error::Changed { .. }), "{error}");
    }
}

#[test]
fn a_block_that_somebody_else_changed_after_this_handle_wrote_it_is_refused() {
    for kind in [Device::of as fn(Live) -> Device, Device::written] {
        let dir = tempfile::tempdir().unwrap();
        let mut device = kind(make_model(dir.path(), false, 0, 5));
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        let lookup = device.live.index("lookup");
        device.write(lookup, 4000, 1);
        device.sync(&mut checkpoint, 1).unwrap();
        let path = dir.path().join("model.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - 10;
        bytes[at] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        device.write(lookup, 4001, 1);
        let error = device.sync(&mut checkpoint, 2).unwrap_err();
        assert!(matches!(&error, checkpoint::Error::Changed { tensor, .. } if tensor == "lookup"), "{error}");
        assert!(std::fs::read(&path).unwrap() == bytes, "nothing was written");
    }
}

#[test]
fn a_sync_makes_no_generation_where_nothing_was_trained_skipped_or_written_since() {
    for kind in [Device::of as fn(Live) -> Device, Device::written] {
        let dir = tempfile::tempdir().unwrap();
        let mut device = kind(make_model(dir.path(), false, 0, 31));
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        checkpoint.assume_equal(&device);
        // The base has no optimizer state, which is as good as one that has not begun.
        let base = tree(dir.path());
        let fresh = progress(0);
        let same = |progress: &Progress, checkpoint: &mut Checkpoint, device: &Device| {
            let mut write = |out: &mut dyn std::io::Write| out.write_all(&state_of(progress.cursor));
            let mut told = Vec::new();
            let report =
                checkpoint.sync(device, &mut write, progress.clone(), &mut |done, all| told.push((done, all))).unwrap();
            assert_eq!(told.last(), Some(&(device.bytes(), device.bytes())));
            report
        };
        let report = same(&Progress { loss: None, ..fresh }, &mut checkpoint, &device);
        assert!(report.unchanged && report.generation == 0, "{report}");
        assert!(tree(dir.path()) == base);

        device.write(0, 5000, 1);
        assert!(!device.sync(&mut checkpoint, 1).unwrap().unchanged);
        let one = tree(dir.path());
        for _ in 0..4 {
            // Another server, another count of versions: the same training.
            let again = Progress { epoch: "other".into(), weight_version: 99, ..progress(1) };
            let report = same(&again, &mut checkpoint, &device);
            assert!(report.unchanged && report.generation == 1, "{report}");
            assert!(report.to_string().starts_with("nothing changed since generation 1"), "{report}");
        }
        assert!(tree(dir.path()) == one, "not a byte is written");
        checkpoint.verify().unwrap();

        // An example that a gate skipped: its cursor becomes durable.
        let skipped = Progress { cursor: 2, ..progress(1) };
        let mut state = |out: &mut dyn std::io::Write| out.write_all(&state_of(1));
        let report = checkpoint.sync(&device, &mut state, skipped.clone(), &mut |_, _| {}).unwrap();
        assert!(!report.unchanged && report.generation == 2 && report.blocks_changed == 0, "{report}");
        drop(checkpoint);
        let (mut checkpoint, _) = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.current().progress, skipped);
        checkpoint.assume_equal(&device);
        // Another optimizer state, as after another rank: it becomes durable.
        let mut other = |out: &mut dyn std::io::Write| out.write_all(&state_of(7));
        let report = checkpoint.sync(&device, &mut other, skipped.clone(), &mut |_, _| {}).unwrap();
        assert!(!report.unchanged && read_state(&checkpoint) == Some(state_of(7)), "{report}");
        // Somebody else wrote into the live weights.
        device.write(1, 100, 1);
        let report = checkpoint.sync(&device, &mut other, skipped.clone(), &mut |_, _| {}).unwrap();
        assert!(!report.unchanged && report.blocks_changed == 1, "{report}");
        assert_files_are(&checkpoint, &device.live);
    }
}
