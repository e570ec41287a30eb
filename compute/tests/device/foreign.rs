//! Foreign memory: decoding, and writes that touch the tensor and nothing beside it.

use crate::random::{DTYPES, Random};
use compute::{
    AdamRow, AdamwRows, ApolloCommit, ApolloPrepare, Compressed, Cpu, Device, Dtype, Factors, Moments, NORM_FACTOR,
    NORM_SLOTS, ScaleType, Stream, Write, cpu::Weight,
};
use std::cell::UnsafeCell;
use std::ptr::NonNull;
use std::sync::Arc;

const GUARD: u8 = 0xA5;

/// An allocation that stands for a server's: a tensor may lie anywhere in it.
struct Foreign(Box<[UnsafeCell<u8>]>);

// SAFETY: the tests touch the cells through `Weight`, or after the writer has returned.
unsafe impl Sync for Foreign {}
// SAFETY: as above.
unsafe impl Send for Foreign {}

impl Foreign {
    fn new(bytes: usize) -> Arc<Foreign> {
        Arc::new(Foreign((0..bytes).map(|_| UnsafeCell::new(GUARD)).collect()))
    }
    fn bytes(&self) -> Vec<u8> {
        // SAFETY: nobody writes while the tests look.
        self.0.iter().map(|b| unsafe { *b.get() }).collect()
    }
    /// A first byte of a tensor that is aligned to `size` and to nothing more, near byte 64.
    fn start(&self, size: usize) -> usize {
        let address = self.0.as_ptr().addr();
        (64..).find(|at| (address + at) % 32 == size).expect("one in 32 is")
    }
    fn weight(self: &Arc<Foreign>, dtype: Dtype, rows: usize, cols: usize, at: usize) -> Weight {
        assert!(at + rows * cols * dtype.size() <= self.0.len());
        let data = NonNull::new(self.0[at].get()).expect("a box is not null");
        // SAFETY: inside the allocation as asserted, which the weight keeps; tests hold no
        // reference to its bytes.
        unsafe { Weight::new(data, dtype, rows, cols, self.clone()) }
    }
}

#[test]
fn weights_are_decoded_as_their_dtype_says() {
    // Every pattern of 16 bits that is not NaN, and the bytes where they lie.
    for dtype in [Dtype::F16, Dtype::BF16] {
        let memory = Foreign::new(64 + 4 + 2 * 65536 + 64);
        let at = memory.start(2);
        for pattern in 0..=u16::MAX {
            for (i, byte) in pattern.to_le_bytes().into_iter().enumerate() {
                // SAFETY: no other access to the allocation yet.
                unsafe { *memory.0[at + 2 * pattern as usize + i].get() = byte };
            }
        }
        for (pattern, value) in memory.weight(dtype, 64, 1024, at).values().into_iter().enumerate() {
            let pattern = pattern as u16;
            let want = match dtype {
                Dtype::BF16 => half::bf16::from_bits(pattern).to_f32(),
                _ => half::f16::from_bits(pattern).to_f32(),
            };
            assert!(value.to_bits() == want.to_bits() || want.is_nan() && value.is_nan(), "{dtype} {pattern:#x}");
        }
    }
}

#[test]
fn a_part_of_a_row_is_read_and_written_where_it_lies() {
    let mut r = Random::new("part");
    for dtype in DTYPES {
        let memory = Foreign::new(64 + 64 + 7 * 1500 * 4 + 64);
        let at = memory.start(dtype.size());
        let w = memory.weight(dtype, 7, 1500, at);
        for _ in 0..50 {
            let (row, col) = (r.below(7), r.below(1500));
            let len = 1 + r.below(1500 - col);
            let before = memory.bytes();
            let values: Vec<f32> = (0..len).map(|_| r.below(256) as f32 - 128.0).collect();
            w.write(row, col, &values, &Stream::rounding(1, 1, 1));
            let mut back = vec![f32::NAN; len];
            w.read(row, col, &mut back);
            assert_eq!(back, values, "{dtype} ({row},{col}) {len}");
            let first = at + (row * 1500 + col) * dtype.size();
            for (i, (a, b)) in before.iter().zip(memory.bytes()).enumerate() {
                let inside = (first..first + len * dtype.size()).contains(&i);
                assert!(inside || *a == b, "{dtype}: byte {i} beside {first} + {len} elements was written");
            }
        }
    }
}

const MOMENTS: Moments = Moments { beta1: 0.9, beta2: 0.999, eps: 1e-6 };

/// The three operations that write weights, on a tensor of (m,n) with factors over t rows.
fn write_all_ways(w: &Weight, r: &mut Random) -> [&'static str; 3] {
    let device = Cpu::new(2).expect("two threads");
    let ((m, n), t, rank) = ((w.rows(), w.cols()), 3, 2);
    let (x, dy, p) = (r.normals(t * n), r.normals(t * m), r.normals(rank * m.min(n)));
    let f = Factors { x: &x, dy: &dy, t, m, n };
    let write = Write { step: 0.5, decay: 0.01, stream: Stream::rounding(1, 1, 1) };
    let zeros = |n: usize| device.zeros(n);
    let stored = |n: usize| device.stored(Dtype::F32, n);
    let c = Compressed { projection: &p, rank, scale_type: ScaleType::Channel, moments: MOMENTS, weight: w.dtype() };
    let (mut s, mut norms, mut a, mut b) =
        (zeros(m.max(n)), zeros(NORM_SLOTS), stored(rank * m.max(n)), stored(rank * m.max(n)));
    device.run(|| {
        device.apollo_prepare(
            &mut norms,
            &mut [ApolloPrepare { s: &mut s, at: 0, exp_avg: &a, exp_avg_sq: &b, factors: f, compressed: c }],
        );
        norms[NORM_FACTOR] = 1.0;
        device.apollo_commit(
            &mut norms,
            &mut [ApolloCommit {
                w,
                s: &s,
                at: 0,
                exp_avg: &mut a,
                exp_avg_sq: &mut b,
                factors: f,
                compressed: c,
                write,
            }],
        );
        device.adamw_factors(w, &mut stored(m * n), &mut stored(m * n), &f, MOMENTS, write);
        let rows = [0, m - 1].map(|row| AdamRow { row: row as u32, slot: 0, step: 0.5 });
        let g = r.normals(2 * n);
        device.adamw_rows(
            &mut [AdamwRows { w, rows: &rows, g: &g, exp_avg: &mut stored(n), exp_avg_sq: &mut stored(n), write }],
            MOMENTS,
        );
    });
    ["apollo_commit", "adamw_factors", "adamw_rows"]
}

#[test]
fn the_writing_operations_touch_nothing_outside_the_tensor() {
    let mut r = Random::new("guards");
    for dtype in DTYPES {
        for (m, n) in [(1, 1), (5, 3), (3, 17), (300, 33), (9, 1025)] {
            let bytes = m * n * dtype.size();
            let memory = Foreign::new(64 + 64 + bytes + 64);
            let at = memory.start(dtype.size());
            let w = memory.weight(dtype, m, n, at);
            (0..m).for_each(|row| w.write(row, 0, &vec![1.0; n], &Stream::rounding(1, 1, 1)));
            let names = write_all_ways(&w, &mut r);
            let after = memory.bytes();
            for (i, &b) in after.iter().enumerate() {
                let inside = (at..at + bytes).contains(&i);
                assert!(
                    inside || b == GUARD,
                    "{dtype} ({m},{n}): one of {names:?} wrote byte {i} outside {at}+{bytes}"
                );
            }
            // A 16-bit element may come back to 1 by chance.
            let same = w.values().iter().filter(|&&v| v == 1.0).count();
            let chance = if dtype == Dtype::F32 { 0 } else { m * n / 50 };
            assert!(same <= chance, "{dtype} ({m},{n}): {same} elements were left out");
        }
    }
}

#[test]
fn memory_stays_as_long_as_its_weight() {
    let memory = Foreign::new(256);
    let at = memory.start(2);
    let w = memory.weight(Dtype::BF16, 2, 4, at);
    let owner = Arc::downgrade(&memory);
    drop(memory);
    assert!(owner.upgrade().is_some(), "the weight let go of its memory");
    assert_eq!(w.values().len(), 8);
    drop(w);
    assert!(owner.upgrade().is_none());
}

#[test]
#[should_panic(expected = "not aligned")]
fn a_weight_that_is_not_aligned_to_its_element_is_refused() {
    let memory = Foreign::new(256);
    let at = memory.start(2);
    memory.weight(Dtype::F32, 1, 1, at);
}
