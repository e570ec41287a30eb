//! Fuzz targets for everything that apollod reads from outside.
//!
//! A target takes any bytes and must neither panic nor end the process, nor take memory out of proportion to them
//! ([`memory`]); where there is a writer, what was read and written must read as the same. `tests/replay.rs` runs the
//! seeds and all inputs that were ever found to break one (`regressions/TARGET/`); `ci/fuzz.py` looks for new ones.

pub mod memory;
mod targets;

pub use targets::TARGETS;

/// One parser, or a few that read the same.
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Runs it on one input. Returns whether the input was accepted.
    pub accepts: fn(&[u8]) -> bool,
    /// Inputs to begin with; the first is accepted.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the input's language.
    pub words: &'static [&'static str],
}

impl Target {
    /// Runs the target on one input within the bounds of [`memory`]. Returns whether the input was accepted.
    pub fn run(&self, input: &[u8]) -> bool {
        let _bounds = memory::Bounds::of(input);
        (self.accepts)(input)
    }

    /// The words in the form that libFuzzer reads.
    pub fn dictionary(&self) -> String {
        let byte = |byte: u8| format!("\\x{byte:02x}");
        let quoted = |word: &&str| format!("\"{}\"\n", word.bytes().map(byte).collect::<String>());
        self.words.iter().map(quoted).collect()
    }
}
