//! A prefix code for differences of weights: small numbers in few bits, fast enough not to hold up a disk.
//!
//! z: a number of 16 bits, mostly small · symbol: min(z, 15), of which 15 is the escape · code: 1 to 7 bits of a symbol
//!
//! ```text
//! 0       8  lengths of the 16 codes in bits, 4 bits each, the lower half of a byte first
//! 8       4  e, number of escapes
//! 12     2e  z of the escapes, in order
//! 12+2e   …  the codes, from the lowest bit of each byte on; the last byte is filled up with zeros
//! ```
//!
//! Differences of trained weights do not repeat each other, so how often each value occurs is all that a code can use. zstd
//! looks for repetitions first and codes bytes where values are wanted: of the weights of `apollod bench sync` it
//! leaves 0.156 of the bytes at 1.1 GB/s a core; this code leaves 0.154 at 4 (research/LOG.md).

#[cfg(target_arch = "x86_64")]
mod avx2;
mod code;

pub(crate) use code::Counts;
use code::{AT_ONCE, Code, ESCAPE, LONGEST, WINDOW};

/// Bytes before the escapes.
const HEAD: usize = 12;

/// Codes numbers that come in any number of parts. Keeps its memory from one [`Packer::begin`] to the next.
#[derive(Debug, Default)]
pub(crate) struct Packer {
    code: Code,
    escapes: Vec<u16>,
    bytes: Vec<u8>,
    /// Bits that are no whole byte yet, and how many.
    rest: u64,
    rest_bits: u32,
}

impl Packer {
    /// Begins, with a code for numbers of which these counts are typical.
    pub(crate) fn begin(&mut self, counts: &Counts) {
        self.code = Code::best(counts);
        self.escapes.clear();
        self.bytes.clear();
        (self.rest, self.rest_bits) = (0, 0);
    }

    /// Adds numbers.
    pub(crate) fn add(&mut self, numbers: &[u16]) {
        #[cfg(target_arch = "x86_64")]
        let numbers = avx2::add_groups(self, numbers);
        self.add_each(numbers);
    }

    /// [`Packer::add`], one after the other.
    fn add_each(&mut self, numbers: &[u16]) {
        for z in numbers {
            let symbol = *z.min(&ESCAPE);
            if symbol == ESCAPE {
                self.escapes.push(*z);
            }
            let (bits, length) = self.code.of(symbol);
            self.rest |= bits << self.rest_bits;
            self.rest_bits += length;
            if self.rest_bits >= 32 {
                self.bytes.extend_from_slice(&(self.rest as u32).to_le_bytes());
                self.rest >>= 32;
                self.rest_bits -= 32;
            }
        }
        let whole = (self.rest_bits / 8) as usize;
        self.bytes.extend_from_slice(&self.rest.to_le_bytes()[..whole]);
        self.rest >>= 8 * whole;
        self.rest_bits %= 8;
    }

    /// Appends what was added to `out`.
    pub(crate) fn end(&mut self, out: &mut Vec<u8>) {
        if self.rest_bits > 0 {
            self.bytes.push(self.rest as u8);
        }
        out.extend_from_slice(&self.code.to_bytes());
        out.extend_from_slice(&(self.escapes.len() as u32).to_le_bytes());
        out.extend(self.escapes.iter().flat_map(|z| z.to_le_bytes()));
        out.extend_from_slice(&self.bytes);
    }
}

/// Reads as many numbers as `numbers` has; gives what follows them, or nothing if these are not the bytes of so many.
pub(crate) fn unpack<'a>(bytes: &'a [u8], numbers: &mut [u16]) -> Option<&'a [u8]> {
    let (head, rest) = bytes.split_first_chunk::<HEAD>()?;
    let (lengths, count) = head.split_first_chunk::<8>()?;
    let code = Code::from_bytes(lengths)?;
    let escapes = u32::from_le_bytes(count.try_into().ok()?) as usize;
    let (escapes, rest) = rest.split_at_checked(escapes.checked_mul(2)?)?;
    let rest = read_codes(&code, rest, numbers)?;
    let mut escapes = escapes.as_chunks::<2>().0.iter().map(|z| u16::from_le_bytes(*z));
    for z in numbers.iter_mut().filter(|z| **z == ESCAPE) {
        *z = escapes.next().filter(|z| *z >= ESCAPE)?;
    }
    escapes.next().is_none().then_some(rest)
}

/// Reads symbols; gives the bytes after the one in which the last of them ends.
fn read_codes<'a>(code: &Code, bytes: &'a [u8], symbols: &mut [u16]) -> Option<&'a [u8]> {
    /// Entries whose bits are in any word from whatever bit of its first byte on.
    const ENTRIES: usize = 57 / WINDOW as usize;
    let table = code.table();
    // The next bit to be read, and the symbols to be found.
    let (mut at, mut left) = (0u64, symbols);
    while left.len() >= ENTRIES * AT_ONCE
        && let Some(word) = bytes.get((at / 8) as usize..).and_then(|rest| rest.first_chunk())
    {
        let mut window = u64::from_le_bytes(*word) >> (at % 8);
        for _ in 0..ENTRIES {
            let entry = &table[window as usize % table.len()];
            left[..AT_ONCE].copy_from_slice(&entry.values);
            left = &mut left[usize::from(entry.count)..];
            window >>= entry.bits;
            at += u64::from(entry.bits);
        }
    }
    for symbol in left {
        let byte = |i: u64| usize::from(bytes.get((at / 8 + i) as usize).copied().unwrap_or(0));
        let window = (byte(0) | byte(1) << 8) >> (at % 8);
        *symbol = table[window % (1 << LONGEST)].values[0];
        at += u64::from(code.of(*symbol).1);
    }
    let (read, rest) = bytes.split_at_checked(at.div_ceil(8) as usize)?;
    let filled_up = at % 8 == 0 || read.last()? >> (at % 8) == 0;
    filled_up.then_some(rest)
}

#[cfg(test)]
mod tests;
