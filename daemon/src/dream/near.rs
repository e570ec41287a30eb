//! Near-duplicates: texts that share most of their three-word sequences.

use std::collections::HashSet;

/// Words of a sequence.
const WORDS: usize = 3;

/// The word sequences of a text; of a short one, its words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shingles(HashSet<Vec<String>>);

impl Shingles {
    /// Of a text, without regard to case and punctuation.
    pub fn of(text: &str) -> Self {
        let words: Vec<String> =
            text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_lowercase).collect();
        let size = WORDS.min(words.len()).max(1);
        Self(words.windows(size).map(<[String]>::to_vec).collect())
    }

    /// What they share of all that either has (Jaccard), in [0, 1]; two texts without words are the same.
    pub fn similarity(&self, other: &Self) -> f64 {
        let shared = self.0.intersection(&other.0).count();
        let all = self.0.len() + other.0.len() - shared;
        if all == 0 { 1.0 } else { shared as f64 / all as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_words_are_near_and_others_are_not() {
        let similarity = |a: &str, b: &str| Shingles::of(a).similarity(&Shingles::of(b));
        assert_eq!(similarity("Mira lives by the lake.", "mira lives, by the LAKE"), 1.0);
        assert_eq!(similarity("Mira lives by the lake", "Toby eats golden honey now"), 0.0);
        // Sequences: a b c, b c d, c d e against a b c, b c d, c d f.
        assert_eq!(similarity("a b c d e", "a b c d f"), 0.5);
        assert_eq!(similarity("yes", "Yes!"), 1.0);
        assert_eq!(similarity("yes", "no"), 0.0);
        assert_eq!(similarity("", "..."), 1.0);
    }
}
