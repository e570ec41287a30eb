//! Tests of the code: what comes out went in, whatever it is and however it was added, and damage is refused.

use super::code::{AT_ONCE, SYMBOLS};
use super::*;
use proptest::prelude::*;

/// Numbers of some length, of which most are small.
fn numbers() -> impl Strategy<Value = Vec<u16>> {
    let number = |largest: u16| prop_oneof![9 => 0..=largest.min(14), 1 => any::<u16>()];
    (0usize..700, prop_oneof![Just(0u16), Just(2), Just(14)])
        .prop_flat_map(move |(n, largest)| proptest::collection::vec(number(largest), n))
}

fn packed(numbers: &[u16], sample: &[u16], cuts: &[usize]) -> Vec<u8> {
    let mut packer = Packer::default();
    packer.begin(&{
        let mut counts = Counts::new();
        counts.add(sample);
        counts
    });
    let mut left = numbers;
    for cut in cuts {
        let (now, later) = left.split_at(cut % (left.len() + 1));
        packer.add(now);
        left = later;
    }
    packer.add(left);
    let mut bytes = vec![77];
    packer.end(&mut bytes);
    assert_eq!(bytes.remove(0), 77, "bytes are appended");
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn what_was_added_comes_out(numbers in numbers(), sample in numbers(), cuts in any::<[usize; 3]>(), after in 0usize..20) {
        let mut bytes = packed(&numbers, &sample, &cuts);
        // The same whatever the parts were, and whichever instructions the processor has.
        prop_assert_eq!(&bytes, &packed(&numbers, &sample, &[]));
        let mut packer = Packer { code: Code::from_bytes(bytes[..8].try_into().unwrap()).unwrap(), ..Packer::default() };
        packer.add_each(&numbers);
        let mut one_by_one = Vec::new();
        packer.end(&mut one_by_one);
        prop_assert_eq!(&bytes, &one_by_one);
        // What follows is given back.
        bytes.resize(bytes.len() + after, 0xff);
        let mut read = vec![9; numbers.len()];
        prop_assert_eq!(unpack(&bytes, &mut read), Some(&vec![0xff; after][..]));
        prop_assert_eq!(read, numbers);
    }

    #[test]
    fn any_bytes_are_read_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), n in 0usize..300) {
        // Lengths that are a code's, so that something is read.
        if bytes.len() > 12 {
            bytes[..8].copy_from_slice(&Code::default().to_bytes());
            bytes[9..12].fill(0);
        }
        let mut read = vec![0; n];
        let _ = unpack(&bytes, &mut read);
    }
}

#[test]
fn a_packer_is_used_again() {
    let mut packer = Packer::default();
    for numbers in [vec![70, 1, 15, 14, 0], vec![3; 100], vec![]] {
        packer.begin(&Counts::new());
        packer.add(&numbers);
        let mut bytes = Vec::new();
        packer.end(&mut bytes);
        let mut read = vec![0; numbers.len()];
        assert!(unpack(&bytes, &mut read).is_some_and(<[u8]>::is_empty));
        assert_eq!(read, numbers);
    }
}

#[test]
fn what_is_not_whole_or_not_a_code_is_refused() {
    let numbers: Vec<u16> = (0..100).map(|i| i % 19).collect();
    let good = packed(&numbers, &numbers, &[]);
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        unpack(&bytes, &mut [0; 100]).is_none()
    };
    assert!(!refused(&|_| ()));
    assert!(refused(&|bytes| bytes.truncate(good.len() - 1)), "a byte less");
    assert!(refused(&|bytes| bytes.truncate(11)), "no head");
    assert!(refused(&|bytes| bytes[0] ^= 1), "a code that is not complete");
    assert!(refused(&|bytes| bytes[..8].fill(0)), "no code");
    assert!(refused(&|bytes| bytes[8] += 1), "an escape more than there are");
    assert!(refused(&|bytes| bytes[8] -= 1), "one less");
    let unused = |bytes: &mut Vec<u8>| {
        bytes[8] += 1;
        bytes.splice(12..12, 15u16.to_le_bytes());
    };
    assert!(refused(&unused), "an escape that no code asks for");
    assert!(refused(&|bytes| bytes[12..14].copy_from_slice(&3u16.to_le_bytes())), "an escape that has a code");
    let last = good.len() - 1;
    assert!(refused(&|bytes| bytes[last] |= 0x80), "what fills up the last byte is not zero");
}

#[test]
fn codes_are_as_short_as_counts_allow_and_never_too_long() {
    let lengths = |counts: &[(u16, usize)]| {
        let mut all = Counts::new();
        counts.iter().for_each(|(symbol, n)| all.add(&vec![*symbol; *n]));
        Code::best(&all).lengths
    };
    assert_eq!(lengths(&[]), [4; SYMBOLS], "all the same");
    let most_are_zero = lengths(&[(0, 1_000_000), (1, 1000), (2, 1000)]);
    assert_eq!(most_are_zero[0], 1);
    assert_eq!(most_are_zero.iter().max(), Some(&(LONGEST as u8)));
    // Powers of two would have codes of 15 bits.
    let powers: Vec<(u16, usize)> = (0..16).map(|symbol| (symbol, 1 << symbol)).collect();
    assert!(lengths(&powers).iter().all(|length| (1..=LONGEST as u8).contains(length)));
    // Each twice as frequent as the next: a bit more.
    let halves = lengths(&[(3, 4096), (9, 2048), (0, 1024)]);
    assert_eq!((halves[3], halves[9], halves[0]), (1, 2, 3));
}

#[test]
fn an_entry_has_as_many_symbols_as_are_whole() {
    let mut counts = Counts::new();
    counts.add(&[0; 1000]);
    let code = Code::best(&counts);
    let table = code.table();
    assert_eq!((table[0].count as usize, table[0].bits), (AT_ONCE, 4), "codes of one bit");
    for (window, entry) in table.iter().enumerate() {
        let mut at = 0;
        for symbol in &entry.values[..entry.count.into()] {
            let (bits, length) = code.of(*symbol);
            assert_eq!((window as u64 >> at) % (1 << length), bits);
            at += length;
        }
        assert_eq!(u32::from(entry.bits), at);
        assert!((1..=AT_ONCE).contains(&entry.count.into()) && at <= WINDOW);
        let whole = |symbol: u16| {
            let (bits, length) = code.of(symbol);
            at + length <= WINDOW && (window as u64 >> at) % (1 << length) == bits
        };
        let more = usize::from(entry.count) < AT_ONCE && (0..SYMBOLS as u16).any(whole);
        assert!(!more, "{window:#b} has another whole symbol after {}", entry.count);
    }
}
