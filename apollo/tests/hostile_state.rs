//! State bytes that are cut off, flipped or made up: an error or a usable optimizer, never a panic
//! and never an allocation that neither the tensors nor the bytes account for.

#[allow(dead_code)]
#[path = "step/common.rs"]
mod common;

use common::{EMBED, Random, Rig, header, settings, tensors};
use compute::Dtype;
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The largest single request since the last reset.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(p, layout, size) }
    }
    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The transfer buffer is 256 KiB, the states here are far smaller.
const MOST: usize = 1 << 20;

fn rig() -> Rig {
    Rig::new(tensors(), settings(), Dtype::F32)
}

/// A state with moments, norms and a lookup in it.
fn state(r: &mut Random) -> Vec<u8> {
    let mut rig = rig();
    for _ in 0..3 {
        let g = rig.gradients(r, 3);
        rig.apply(&g);
    }
    rig.saved()
}

/// Loads; if that succeeds, trains a step and saves. Returns whether it did.
fn survives(bytes: &[u8], r: &mut Random, what: &str) -> bool {
    let mut rig = rig();
    LARGEST.store(0, Relaxed);
    let result = rig.optimizer.load(&mut &*bytes);
    let largest = LARGEST.load(Relaxed);
    assert!(largest < MOST, "{what}: {largest} bytes at once for a state of {}", bytes.len());
    match result {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(rig.optimizer.steps(), 0, "{what}: an error, but not as new");
            false
        }
        Ok(restored) => {
            assert_eq!(rig.optimizer.steps(), restored.steps, "{what}");
            let g = rig.gradients(r, 2);
            let _ = rig.step(&g);
            rig.saved();
            true
        }
    }
}

/// `header` in front of the moments of `state`.
fn with_header(state: &[u8], header: &Value) -> Vec<u8> {
    let length = u64::from_le_bytes(state[8..16].try_into().expect("eight bytes")) as usize;
    let text = serde_json::to_vec(header).expect("json");
    [&state[..8], &(text.len() as u64).to_le_bytes(), &text, &state[16 + length..]].concat()
}

/// One test, so that no other allocates meanwhile.
#[test]
fn no_bytes_make_a_load_panic_or_allocate_absurdly() {
    let mut r = Random::new("hostile");
    let good = state(&mut r);
    assert!(survives(&good, &mut r, "good"));
    assert!(survives(&with_header(&good, &header(&good)), &mut r, "header written again"));
    truncated(&good, &mut r);
    mutated(&good, &mut r);
    made_up(&good, &mut r);
}

fn truncated(good: &[u8], r: &mut Random) {
    let header = 16 + u64::from_le_bytes(good[8..16].try_into().expect("eight bytes")) as usize;
    for len in (0..header + 64).step_by(7).chain((header..good.len()).step_by(997)).chain([good.len() - 1]) {
        assert!(!survives(&good[..len], r, &format!("cut at {len}")), "{len} of {} bytes were taken", good.len());
    }
}

fn mutated(good: &[u8], r: &mut Random) {
    let header = 16 + u64::from_le_bytes(good[8..16].try_into().expect("eight bytes")) as usize;
    let mut taken = 0;
    for round in 0..3000 {
        let mut bytes = good.to_vec();
        for _ in 0..1 + r.below(4) {
            let at = r.below(if round % 4 == 0 { good.len() } else { header });
            // A digit for a digit keeps the JSON whole, and the numbers wrong.
            bytes[at] = if bytes[at].is_ascii_digit() { b'0' + r.below(10) as u8 } else { r.next() as u8 };
        }
        taken += survives(&bytes, r, &format!("round {round}")) as usize;
    }
    assert!((50..2900).contains(&taken), "{taken} of 3000 were taken: the mutations test too little");
}

/// Changes one field of a good header.
fn changed(good: &[u8], change: impl Fn(&mut Value)) -> Vec<u8> {
    let mut header = header(good);
    change(&mut header);
    with_header(good, &header)
}

fn made_up(good: &[u8], r: &mut Random) {
    let lengths = [u64::MAX, u64::MAX / 4, u64::MAX / 8 + 1, 1 << 61, 1 << 40, 1 << 31, 3];
    for tensor in 0..tensors().len() {
        for len in lengths {
            // A short length is another tensor's: it starts from zero, and what follows is left over.
            let itself = changed(good, |h| h["tensors"][tensor]["len"] = json!(len));
            assert!(!survives(&itself, r, "len") || len == 3, "tensor {tensor} with {len} values was taken");
            let unknown = changed(good, |h| {
                h["tensors"][tensor]["len"] = json!(len);
                h["tensors"][tensor]["name"] = json!("unknown");
            });
            assert!(!survives(&unknown, r, "unknown") || len == 3, "{len} values of an unknown tensor");
            survives(&changed(good, |h| h["tensors"][tensor]["rows"] = json!(len)), r, "rows");
            survives(&changed(good, |h| h["tensors"][tensor]["cols"] = json!(len)), r, "cols");
            survives(&changed(good, |h| h["tensors"][tensor]["rank"] = json!(len)), r, "rank");
        }
    }
    let row = header(good)["tensors"][EMBED]["lookup"].as_object().expect("a map").keys().next().expect("one").clone();
    let entry = |field: &str, value: u64| changed(good, |h| h["tensors"][EMBED]["lookup"][&row][field] = json!(value));
    for (field, value) in [("slot", 30), ("slot", u32::MAX as u64), ("gradients", u64::MAX), ("last_step", u64::MAX)] {
        assert!(!survives(&entry(field, value), r, field), "{field} {value} was taken");
    }
    let other = header(good)["tensors"][EMBED]["lookup"][&row]["slot"].as_u64().expect("a slot") ^ 1;
    assert!(!survives(&entry("slot", other), r, "slot"), "two rows with one slot were taken");
    for steps in [u64::MAX, u64::MAX - 1, 1 << 33] {
        assert!(!survives(&changed(good, |h| h["steps"] = json!(steps)), r, "steps"), "{steps} steps were taken");
    }
    for norm in [f32::NAN, f32::INFINITY, -1.0] {
        let bits = json!(norm.to_bits());
        assert!(!survives(&changed(good, |h| h["tensors"][0]["norm_bits"] = bits.clone()), r, "norm"), "norm {norm}");
    }
    // Twice the same tensor: the second is not taken, and the bytes run out.
    let twice = changed(good, |h| {
        let first = h["tensors"][0].clone();
        h["tensors"].as_array_mut().expect("an array").push(first);
    });
    assert!(!survives(&twice, r, "twice"));
    let mut length = good.to_vec();
    length[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(!survives(&length, r, "length of the header"));
    poisoned_moments(good, r);
}

/// A moment that no step can leave would reach the weights: the first value of the first tensor.
fn poisoned_moments(good: &[u8], r: &mut Random) {
    let first = 16 + u64::from_le_bytes(good[8..16].try_into().expect("eight bytes")) as usize;
    let second = first + 4 * header(good)["tensors"][0]["len"].as_u64().expect("a length") as usize;
    for (at, value) in [(first, f32::NAN), (first, f32::INFINITY), (second, f32::NAN), (second, -1.0)] {
        let mut bytes = good.to_vec();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(!survives(&bytes, r, "moment"), "a moment of {value} was taken");
    }
}
