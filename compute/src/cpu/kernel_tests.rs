//! Products against f64, and what they may touch.

use super::super::stored::round_to_pairs;
use super::*;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn new(test: &str) -> Random {
        let seed = std::env::var("TEST_SEED").map_or(20_261_122, |s| s.parse().expect("TEST_SEED is a number"));
        println!("{test}: TEST_SEED={seed}");
        Random(seed)
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as i32 as f32 / (1u32 << 31) as f32).collect()
    }
}

fn all_vectors() -> Vec<Vectors> {
    #[allow(unused_mut)]
    let mut all = vec![Vectors::Portable];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            all.push(Vectors::Avx2);
        }
        if simd::has_avx512() {
            all.push(Vectors::Avx512);
        }
    }
    println!("vectors: {all:?}");
    all
}

/// A product in a buffer with `GUARD` everywhere beside C.
struct Case {
    rows: usize,
    k: usize,
    columns: usize,
    /// Beyond what is needed.
    a_gap: usize,
    c_gap: usize,
    a: Vec<f32>,
    /// (k, columns)
    b: Vec<f32>,
    c: Vec<f32>,
}

const GUARD: f32 = 1e30;
const BEFORE: usize = 5;

impl Case {
    fn new(r: &mut Random) -> Case {
        let (rows, k, columns) = (1 + r.below(40), r.below(70), 1 + r.below(70));
        let (a_gap, c_gap) = (r.below(3), r.below(9));
        // Not one element more than is needed.
        let a = r.values((rows - 1) * (k + a_gap) + k);
        Case { rows, k, columns, a_gap, c_gap, a, b: r.values(k * columns), c: r.values(rows * columns) }
    }

    /// The same shape with pairs of bf16 in the place of f32, in A and B.
    fn of_pairs(r: &mut Random) -> Case {
        let case = Case::new(r);
        let mut pairs = |n: usize| {
            let mut out = vec![0.0; n];
            round_to_pairs(&r.values(2 * n), &mut out);
            out
        };
        Case { a: pairs(case.a.len()), b: pairs(case.b.len()), ..case }
    }

    fn packed(&self, vectors: Vectors) -> (Panels, Buffer) {
        let panels = Panels { vectors, k: self.k, columns: self.columns };
        (panels, panels.of_rows(&self.b))
    }

    /// C after the products of these ranges of k, the first of which adds if `accumulate`; the others do.
    fn run(&self, vectors: Vectors, cuts: &[Range<usize>], accumulate: bool) -> Vec<f32> {
        let stride = self.columns + self.c_gap;
        let mut memory = vec![GUARD; BEFORE + self.rows * stride];
        for (i, line) in self.c.chunks_exact(self.columns).enumerate() {
            memory[BEFORE + i * stride..][..self.columns].copy_from_slice(line);
        }
        // C ends with its last element.
        memory.truncate(BEFORE + (self.rows - 1) * stride + self.columns);
        let (panels, packed) = self.packed(vectors);
        let shared = Shared::new(&mut memory);
        for (i, k) in cuts.iter().enumerate() {
            let a = Rows::new(&self.a[k.start..], self.rows, self.k + self.a_gap);
            // SAFETY: nobody else uses the memory.
            unsafe { product(&shared, BEFORE, stride, a, panels, &packed, k.clone(), accumulate || i > 0) };
        }
        let beside = |i: &usize| *i < BEFORE || (i - BEFORE) % stride >= self.columns;
        assert!((0..memory.len()).filter(beside).all(|i| memory[i] == GUARD), "wrote beside C");
        (0..self.rows).flat_map(|i| memory[BEFORE + i * stride..][..self.columns].to_vec()).collect()
    }

    /// The largest error of C, in units of what rounding may cost: k + 1 roundings of at most the sum of the sizes.
    fn error(&self, c: &[f32], accumulate: bool) -> f64 {
        self.error_of(c, accumulate, |a, b| vec![a as f64 * b as f64])
    }

    /// Likewise, with what an element of A and one of B contribute, each exact in f32.
    fn error_of(&self, c: &[f32], accumulate: bool, products: fn(f32, f32) -> Vec<f64>) -> f64 {
        let mut worst = 0.0f64;
        for i in 0..self.rows {
            for j in 0..self.columns {
                let before = if accumulate { self.c[i * self.columns + j] as f64 } else { 0.0 };
                let terms: Vec<f64> = (0..self.k)
                    .flat_map(|p| products(self.a[i * (self.k + self.a_gap) + p], self.b[p * self.columns + j]))
                    .collect();
                let want = before + terms.iter().sum::<f64>();
                let size = before.abs() + terms.iter().map(|v| v.abs()).sum::<f64>();
                let bound = (2 * terms.len() + 1) as f64 * f32::EPSILON as f64 / 2.0 * size + f64::MIN_POSITIVE;
                worst = worst.max((c[i * self.columns + j] as f64 - want).abs() / bound);
            }
        }
        worst
    }
}

#[test]
fn products_of_any_shape_are_right_and_touch_nothing_beside() {
    let mut r = Random::new("products");
    for _ in 0..400 {
        let case = Case::new(&mut r);
        for vectors in all_vectors() {
            for accumulate in [false, true] {
                let c = case.run(vectors, std::slice::from_ref(&(0..case.k)), accumulate);
                let error = case.error(&c, accumulate);
                let Case { rows, k, columns, .. } = case;
                assert!(error <= 1.0, "{vectors:?} ({rows},{k},{columns}) {accumulate}: {error} of the bound");
            }
        }
    }
}

#[test]
fn the_bits_depend_neither_on_the_cut_nor_on_the_width_of_the_vectors() {
    let mut r = Random::new("cuts");
    for _ in 0..200 {
        let case = Case::new(&mut r);
        let (first, second) = (r.below(case.k + 1), r.below(case.k + 1));
        let (first, second) = (first.min(second), first.max(second));
        let bits = |c: Vec<f32>| c.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        let mut fused = Vec::new();
        for vectors in all_vectors() {
            let whole = bits(case.run(vectors, std::slice::from_ref(&(0..case.k)), true));
            let cut = bits(case.run(vectors, &[0..first, first..second, second..case.k], true));
            assert!(whole == cut, "{vectors:?}: cut at {first} and {second} of {}", case.k);
            if vectors != Vectors::Portable || cfg!(target_arch = "aarch64") {
                fused.push(whole);
            }
        }
        assert!(fused.windows(2).all(|pair| pair[0] == pair[1]), "vectors of 8 and of 16 differ");
    }
}

/// Lower and upper half of each, multiplied.
fn products_of_pairs(a: f32, b: f32) -> Vec<f64> {
    let halves = |v: f32| [f32::from_bits(v.to_bits() << 16) as f64, f32::from_bits(v.to_bits() & 0xFFFF_0000) as f64];
    halves(a).iter().zip(halves(b)).map(|(a, b)| a * b).collect()
}

/// All that multiply pairs here.
fn all_pairs() -> Vec<Vectors> {
    let all: Vec<Vectors> = [Some(Vectors::PortablePairs), Vectors::of_pairs()].into_iter().flatten().collect();
    println!("pairs: {all:?}");
    all
}

#[test]
fn products_of_pairs_are_right_wherever_they_are_cut_and_touch_nothing_beside() {
    let mut r = Random::new("pairs");
    for _ in 0..400 {
        let case = Case::of_pairs(&mut r);
        let Case { rows, k, columns, .. } = case;
        for (vectors, accumulate) in all_pairs().into_iter().flat_map(|v| [(v, false), (v, true)]) {
            let c = case.run(vectors, std::slice::from_ref(&(0..k)), accumulate);
            let error = case.error_of(&c, accumulate, products_of_pairs);
            assert!(error <= 1.0, "{vectors:?} ({rows},{k},{columns}) {accumulate}: {error} of the bound");
            let cut = r.below(k + 1);
            let parts = case.run(vectors, &[0..cut, cut..k], accumulate);
            assert!(c == parts, "{vectors:?} ({rows},{k},{columns}) cut at {cut}");
        }
    }
}

#[test]
fn rows_in_foreign_memory_may_begin_anywhere_and_ask_for_anything() {
    let mut r = Random::new("foreign rows");
    for _ in 0..200 {
        let mut case = Case::of_pairs(&mut r);
        case.a_gap = 0;
        let own = case.run(all_pairs()[0], std::slice::from_ref(&(0..case.k)), true);
        // Not aligned to an element, and nothing after the last one.
        let bytes: Vec<u8> = [0; 2].into_iter().chain(case.a.iter().flat_map(|v| v.to_ne_bytes())).collect();
        for vectors in all_pairs() {
            let (panels, packed) = case.packed(vectors);
            // SAFETY: the bytes from 2 on hold that many elements.
            let a = unsafe { Rows::foreign(bytes[2..].as_ptr().cast(), case.rows, case.k) };
            let nowhere = Ahead { address: std::ptr::null(), of_row: 3, of_column: 1 << 40, step: 1 << 20 };
            for a in [a, a.asking(nowhere)] {
                let mut c = case.c.clone();
                // SAFETY: nobody else uses the memory.
                unsafe { product(&Shared::new(&mut c), 0, case.columns, a, panels, &packed, 0..case.k, true) };
                let apart = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * (1.0 + a.abs());
                assert!(c.iter().zip(&own).all(apart), "{vectors:?} ({},{},{})", case.rows, case.k, case.columns);
            }
        }
    }
}

#[test]
fn pairs_of_rows_are_those_of_columns_and_a_missing_row_is_zero() {
    let mut r = Random::new("pairs of rows");
    for _ in 0..100 {
        let (rows, columns) = (r.below(20), 1 + r.below(70));
        let k = rows.div_ceil(2);
        let b = r.values(rows * columns);
        for vectors in all_pairs() {
            let panels = Panels::of_pairs(vectors, k, columns);
            let packed = panels.of_pairs_of_rows(&b);
            let at = |row: usize, column: usize| if row < rows { b[row * columns + column] } else { 0.0 };
            let real = |i: &usize| i / panels.step() * panels.width() + i % panels.width() < columns;
            for i in (0..panels.len()).filter(real) {
                let (pair, column) =
                    (i % panels.step() / panels.width(), i / panels.step() * panels.width() + i % panels.width());
                let mut want = [0.0];
                round_to_pairs(&[at(2 * pair, column), at(2 * pair + 1, column)], &mut want);
                assert_eq!(
                    packed[i].to_bits(),
                    want[0].to_bits(),
                    "{vectors:?} ({rows},{columns}) at ({pair},{column})"
                );
            }
        }
    }
}

#[test]
fn panels_of_columns_are_those_of_rows() {
    let mut r = Random::new("panels");
    for _ in 0..100 {
        let case = Case::new(&mut r);
        let stride = case.k + 2;
        let mut columns = vec![GUARD; case.columns * stride];
        for (p, row) in case.b.chunks_exact(case.columns).enumerate() {
            row.iter().enumerate().for_each(|(j, v)| columns[j * stride + p] = *v);
        }
        for vectors in all_vectors() {
            let (panels, packed) = case.packed(vectors);
            let other = panels.of_columns(&columns, stride);
            let real = |i: &usize| i / panels.step() * panels.width() + i % panels.width() < case.columns;
            assert!((0..panels.len()).filter(real).all(|i| packed[i] == other[i]), "{vectors:?}");
        }
    }
}

#[test]
#[should_panic(expected = "outside")]
fn a_product_beyond_its_buffer_is_refused() {
    let case = Case::new(&mut Random::new("refused"));
    let (panels, packed) = case.packed(Vectors::best());
    let mut c = vec![0.0; (case.rows - 1) * case.columns + case.columns - 1];
    let a = Rows::new(&case.a, case.rows, case.k + case.a_gap);
    // SAFETY: nobody else uses the memory.
    unsafe { product(&Shared::new(&mut c), 0, case.columns, a, panels, &packed, 0..case.k, false) };
}
