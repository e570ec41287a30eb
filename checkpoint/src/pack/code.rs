//! A canonical prefix code of 16 symbols, none longer than 7 bits.
//!
//! Codes are numbered in the order of (length, symbol), each the one before plus one, and read from their highest bit
//! on, so that the lengths say all. 7 bits because four codes and their lengths are then merged by two
//! multiplications of whole vectors (`avx2.rs`); rarer symbols than one in 128 are rare enough not to matter.

/// The symbol of all numbers that have none of their own.
pub(super) const ESCAPE: u16 = 15;
pub(super) const SYMBOLS: usize = 16;
/// Bits of the longest code.
pub(super) const LONGEST: u32 = 7;
/// Bits that are looked up at once, and the most symbols that are found so.
pub(super) const WINDOW: u32 = 11;
pub(super) const AT_ONCE: usize = 4;

/// How often each symbol occurs; every one a little.
#[derive(Debug, Clone)]
pub(crate) struct Counts([u64; SYMBOLS]);

impl Counts {
    /// Before anything is counted.
    pub(crate) fn new() -> Counts {
        Counts([1; SYMBOLS])
    }

    /// Counts some of the numbers that will come.
    pub(crate) fn add(&mut self, numbers: &[u16]) {
        numbers.iter().for_each(|z| self.0[usize::from(*z.min(&ESCAPE))] += 1);
    }
}

/// What each symbol is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Code {
    /// Bits of each code.
    pub(super) lengths: [u8; SYMBOLS],
    /// The codes, the bit that is read first lowest.
    pub(super) codes: [u8; SYMBOLS],
}

/// What the next [`WINDOW`] bits are: symbols, as many as are whole in them.
#[derive(Clone, Copy)]
pub(super) struct Entry {
    pub(super) values: [u16; AT_ONCE],
    /// How many of the values are symbols, and their bits together.
    pub(super) count: u8,
    pub(super) bits: u8,
}

impl Default for Code {
    fn default() -> Code {
        Code::best(&Counts::new())
    }
}

impl Code {
    /// The best for these counts.
    pub(super) fn best(counts: &Counts) -> Code {
        Code::of_lengths(lengths(&counts.0)).expect("the lengths are a code's")
    }

    /// The code of these lengths; none unless every sequence of bits is one of codes that are not too long.
    fn of_lengths(lengths: [u8; SYMBOLS]) -> Option<Code> {
        const ROOM: u32 = 1 << LONGEST;
        let all = lengths.iter().all(|length| (1..=LONGEST).contains(&u32::from(*length)));
        if !all || lengths.iter().map(|length| ROOM >> length).sum::<u32>() != ROOM {
            return None;
        }
        let (mut codes, mut next) = ([0; SYMBOLS], 0u32);
        for length in 1..=LONGEST {
            for symbol in (0..SYMBOLS).filter(|symbol| u32::from(lengths[*symbol]) == length) {
                codes[symbol] = ((next >> (LONGEST - length)).reverse_bits() >> (32 - length)) as u8;
                next += ROOM >> length;
            }
        }
        Some(Code { lengths, codes })
    }

    /// The lengths, two in a byte.
    pub(super) fn to_bytes(self) -> [u8; SYMBOLS / 2] {
        std::array::from_fn(|i| self.lengths[2 * i] | self.lengths[2 * i + 1] << 4)
    }

    /// The code of such bytes, if they are of one.
    pub(super) fn from_bytes(bytes: &[u8; SYMBOLS / 2]) -> Option<Code> {
        Code::of_lengths(std::array::from_fn(|symbol| bytes[symbol / 2] >> (4 * (symbol % 2)) & 15))
    }

    /// A symbol's code and its length.
    pub(super) fn of(&self, symbol: u16) -> (u64, u32) {
        let symbol = usize::from(symbol);
        (self.codes[symbol].into(), self.lengths[symbol].into())
    }

    /// An entry for each value of a window.
    pub(super) fn table(&self) -> Vec<Entry> {
        let first: [u16; 1 << LONGEST] = std::array::from_fn(|window| {
            let begins = |symbol: &u16| {
                let (code, length) = self.of(*symbol);
                window as u64 % (1 << length) == code
            };
            (0..SYMBOLS as u16).find(begins).expect("the code is complete")
        });
        let entry = |window: usize| {
            let mut entry = Entry { values: [0; AT_ONCE], count: 0, bits: 0 };
            for value in &mut entry.values {
                let symbol = first[(window >> entry.bits) % first.len()];
                let bits = u32::from(entry.bits) + self.of(symbol).1;
                if bits > WINDOW {
                    break;
                }
                *value = symbol;
                (entry.count, entry.bits) = (entry.count + 1, bits as u8);
            }
            entry
        };
        (0..1 << WINDOW).map(entry).collect()
    }
}

/// Lengths of the best code of at most [`LONGEST`] bits, by packages (Larmore and Hirschberg, 1990): each symbol is a coin
/// of every denomination 2⁻¹ to 2⁻⁷, two coins or packages of one denomination are a package of the next, and of the cheapest
/// that are worth 15 together, a symbol has as many bits as it has coins among them.
fn lengths(counts: &[u64; SYMBOLS]) -> [u8; SYMBOLS] {
    let coin = |(symbol, count): (usize, &u64)| (*count, std::array::from_fn(|at| u8::from(at == symbol)));
    let coins: Vec<(u64, [u8; SYMBOLS])> = counts.iter().enumerate().map(coin).collect();
    let mut of_one = Vec::new();
    for _ in 0..LONGEST {
        let packages = of_one.chunks_exact(2).map(|two: &[(u64, [u8; SYMBOLS])]| sum(two)).collect();
        of_one = [coins.clone(), packages].concat();
        of_one.sort_unstable();
    }
    sum(&of_one[..2 * SYMBOLS - 2]).1
}

/// Cost and coins of some packages together.
fn sum(packages: &[(u64, [u8; SYMBOLS])]) -> (u64, [u8; SYMBOLS]) {
    let coins = |symbol| packages.iter().map(|package| package.1[symbol]).sum();
    (packages.iter().map(|package| package.0).sum(), std::array::from_fn(coins))
}
