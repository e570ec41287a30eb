//! Which generations a generation is made of.
//!
//! Generations are numbered as they come, and a rollback makes one more with the content of an earlier one: what a generation holds is
//! found by going back from it, through what rollbacks repeat, and not by comparing numbers.

use checkpoint::Generation;

/// A generation that added something, with the later ones that rollbacks made of it, on the way back from another.
#[derive(Debug)]
pub struct Ancestor<'a> {
    /// The generations with its content that were met, the last made first: the last of them is itself.
    pub same: Vec<&'a Generation>,
}

impl Ancestor<'_> {
    /// Their numbers.
    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        self.same.iter().map(|one| one.generation)
    }
}

/// The ancestors of a generation, itself first; as far as their documents are there.
pub fn ancestors(all: &[Generation], of: u64) -> Vec<Ancestor<'_>> {
    let find = |number: u64| all.iter().find(|one| one.generation == number && one.damage.is_none());
    let mut ancestors: Vec<Ancestor<'_>> = Vec::new();
    let (mut next, mut same) = (find(of), Vec::new());
    while let Some(generation) = next {
        same.push(generation);
        // A rollback leads to an earlier one, as does what was before: this ends.
        next = match generation.rollback_of {
            Some(repeated) => find(repeated),
            None => {
                ancestors.push(Ancestor { same: std::mem::take(&mut same) });
                generation.previous.and_then(find)
            }
        }
        .filter(|earlier| earlier.generation < generation.generation);
    }
    ancestors
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Number, the one before, and what it repeats.
    pub fn generation((number, previous, rollback_of): (u64, Option<u64>, Option<u64>)) -> Generation {
        let document = serde_json::json!({
            "version": 3, "generation": number, "previous": previous, "rollback_of": rollback_of, "created_unix": 0, "created": "",
            "cursor": 0, "step": 0, "examples": 0, "loss": null, "weight_version": 0, "epoch": "", "blocks_total": 0,
            "blocks_changed": 0, "journal_bytes": 0, "written_bytes": 0, "ratio": 0.0, "state": null, "sums_blake3": "",
            "shards": [], "tensors": [], "lineage": "", "seal": ""
        });
        serde_json::from_value(document).unwrap()
    }

    fn numbers(all: &[Generation], of: u64) -> Vec<Vec<u64>> {
        ancestors(all, of).iter().map(|ancestor| ancestor.numbers().collect()).collect()
    }

    #[test]
    fn a_rollback_leads_to_what_it_repeats_and_not_to_what_came_before_it() {
        // 0, 1, 2; back to 1 as 3; 4 after it; back to 2 as 5; back to 4 as 6.
        let all: Vec<Generation> = [
            (0, None, None),
            (1, Some(0), None),
            (2, Some(1), None),
            (3, Some(2), Some(1)),
            (4, Some(3), None),
            (5, Some(4), Some(2)),
            (6, Some(5), Some(4)),
        ]
        .map(generation)
        .into();
        assert_eq!(numbers(&all, 2), [vec![2], vec![1], vec![0]]);
        assert_eq!(numbers(&all, 5), [vec![5, 2], vec![1], vec![0]]);
        assert_eq!(numbers(&all, 6), [vec![6, 4], vec![3, 1], vec![0]]);
        assert_eq!(numbers(&all[3..], 6), [vec![6, 4]], "as far as it is known");
        assert!(numbers(&all, 9).is_empty());
    }
}
