//! Hashes and gathered parts of weights on the simulated driver, against the same in Rust.

use compute::cuda::{DeviceName, Weight};
use compute::hash::{BLOCK_BYTES_MAX, Keys, block_hashes};
use compute::{Cuda, Device, Dtype};
use std::sync::{Arc, OnceLock};

/// splitmix64, seeded, so that a failing test can be run again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

fn seeded(test: &str) -> Random {
    let seed = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("{test}: seed {seed:#x}");
    Random(seed)
}

/// One device for all tests of this program.
fn cuda() -> Arc<Cuda> {
    static CUDA: OnceLock<Arc<Cuda>> = OnceLock::new();
    let open = || {
        simulated_driver::load();
        Arc::new(Cuda::open(&DeviceName::Ordinal(0)).unwrap())
    };
    CUDA.get_or_init(open).clone()
}

/// Weights of these many elements, laid behind each other in one allocation with `gaps` elements before each, and their
/// bytes.
fn weights(cuda: &Arc<Cuda>, random: &mut Random, shapes: &[(Dtype, usize, usize)]) -> Vec<(Weight, Vec<u8>)> {
    let bytes: usize = shapes.iter().map(|(dtype, gap, len)| (gap + len) * dtype.size()).sum();
    let memory = Arc::new(Weight::zeros(cuda, Dtype::BF16, 1, bytes / 2));
    let mut at = 0;
    let weight = |&(dtype, gap, len): &(Dtype, usize, usize)| {
        at += gap * dtype.size();
        // SAFETY: inside `memory`, which the weight keeps.
        let weight = unsafe { Weight::new(memory.ptr() + at as u64, dtype, 1, len, memory.clone()) };
        at += weight.bytes();
        let content = random.bytes(weight.bytes());
        cuda.write_weight(&weight, 0, &content);
        (weight, content)
    };
    shapes.iter().map(weight).collect()
}

/// Work runs when somebody waits for it, and threads in the opposite order: nothing may come out differently.
#[test]
fn the_tests_hold_when_work_is_late_and_in_another_order() {
    if std::env::var_os("SIMULATED_CUDA_LATE").is_some() {
        return;
    }
    let again = std::process::Command::new(std::env::current_exe().unwrap())
        .envs([("SIMULATED_CUDA_LATE", "1"), ("SIMULATED_CUDA_ORDER", "reverse"), ("SIMULATED_CUDA_PAGEABLE", "1")])
        .output()
        .unwrap();
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stdout));
}

#[test]
fn the_kernel_hashes_as_the_cpu_does_for_every_length_and_alignment() {
    let mut random = seeded("hashes");
    let cuda = cuda();
    let mut shapes = vec![
        // Aligned, whole blocks: the vector path. More than a warp's run of blocks.
        (Dtype::BF16, 0, 2048 * 21),
        (Dtype::F32, 0, 1024 * 3 + 1),
        (Dtype::BF16, 4, 1),
        (Dtype::BF16, 1, 0),
        (Dtype::BF16, 0, 2048 * 2),
        (Dtype::F16, 3, 2048 * 9 + 77),
        (Dtype::F32, 1, 5),
    ];
    shapes.extend((0..20).map(|_| (Dtype::BF16, random.below(9), random.below(6000))));
    let held = weights(&cuda, &mut random, &shapes);
    for block_bytes in [BLOCK_BYTES_MAX, 2048, 528, 16] {
        let keys = Keys::new(random.next());
        let want: Vec<u128> = held.iter().flat_map(|(_, bytes)| block_hashes(bytes, block_bytes, &keys)).collect();
        let list: Vec<&Weight> = held.iter().map(|(weight, _)| weight).collect();
        assert_eq!(cuda.block_hashes(&list, block_bytes, &keys), want, "blocks of {block_bytes} bytes");
    }
    assert_eq!(cuda.block_hashes(&[], BLOCK_BYTES_MAX, &Keys::new(1)), []);
}

#[test]
fn a_changed_element_changes_the_hash_of_its_block_alone() {
    let mut random = seeded("changes");
    let cuda = cuda();
    let held = weights(&cuda, &mut random, &[(Dtype::BF16, 0, 2048 * 5 + 100), (Dtype::BF16, 1, 2048 * 4)]);
    let list: Vec<&Weight> = held.iter().map(|(weight, _)| weight).collect();
    let keys = Keys::new(random.next());
    let before = cuda.block_hashes(&list, BLOCK_BYTES_MAX, &keys);
    for _ in 0..20 {
        let weight = random.below(2);
        let at = 2 * random.below(held[weight].1.len() / 2);
        let old = &held[weight].1[at..at + 2];
        cuda.write_weight(list[weight], at, &[old[0] ^ 1 << random.below(8), old[1]]);
        let after = cuda.block_hashes(&list, BLOCK_BYTES_MAX, &keys);
        let changed: Vec<usize> = (0..before.len()).filter(|&block| before[block] != after[block]).collect();
        assert_eq!(changed, [weight * 6 + at / BLOCK_BYTES_MAX], "byte {at} of weight {weight}");
        cuda.write_weight(list[weight], at, old);
    }
}

#[test]
fn parts_come_whole_in_order_and_more_than_fit_at_a_time() {
    let mut random = seeded("parts");
    let cuda = cuda();
    let shapes = [(Dtype::BF16, 0, 3 << 20), (Dtype::BF16, 3, 100_001), (Dtype::F32, 2, 1 << 20)];
    let held = weights(&cuda, &mut random, &shapes);
    for longest in [1 << 20, 10_000, 40] {
        let mut parts: Vec<(usize, std::ops::Range<usize>)> = Vec::new();
        for _ in 0..60 {
            let weight = random.below(held.len());
            let start = random.below(held[weight].1.len());
            let len = random.below(longest + 1).min(held[weight].1.len() - start);
            parts.push((weight, start..start + len));
        }
        parts.push((1, 0..0));
        parts.push((1, 200_001..200_002));
        let mut ahead = cuda.read_ahead(parts.iter().map(|(weight, range)| (&held[*weight].0, range.clone())));
        for (weight, range) in &parts {
            let mut out = vec![0; range.len()];
            ahead.next(&mut out);
            assert!(out == held[*weight].1[range.clone()], "{range:?} of weight {weight}");
        }
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ahead.next(&mut [0]))).is_err());
    }
    // Given up while parts are on their way.
    let whole = |part: usize| (&held[0].0, part << 20..(part + 1) << 20);
    let mut ahead = cuda.read_ahead((0..6).map(whole));
    ahead.next(&mut vec![0; 1 << 20]);
    drop(ahead);
    drop(cuda.read_ahead([]));
}
