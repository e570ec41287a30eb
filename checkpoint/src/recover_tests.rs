//! Tests of what a journal must say of itself before anything of it is believed.

use super::*;
use crate::journal::{Head, Writer};

/// A generation of these files.
fn generation(number: u64, files: &[(&str, u64)]) -> Generation {
    let shard = |(file, bytes): &(&str, u64)| ShardSum {
        file: (*file).into(),
        bytes: *bytes,
        header_bytes: 0,
        header_blake3: String::new(),
    };
    Generation { shards: files.iter().map(shard).collect(), ..Generation::empty(number) }
}

#[test]
fn a_journal_fits_by_its_generation_by_the_one_before_and_by_every_file() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, paths) = (Disk::real(), Paths::new(dir.path()));
    disk.create_dir(&paths.root).unwrap();
    let current = generation(4, &[("a", 10), ("b", 20)]);
    let fits = |generation, previous, files: &[(&str, u64)]| {
        let shard = |(file, bytes): &(&str, u64)| HeadShard { file: (*file).into(), bytes: *bytes };
        let head = Head { generation, previous, shards: files.iter().map(shard).collect() };
        Writer::create(&disk, &paths.journal(), &head).unwrap().sync().unwrap();
        require_fitting(&paths, &Reader::open(&disk, &paths.journal()).unwrap(), &current)
    };
    fits(5, 4, &[("a", 10), ("b", 20)]).unwrap();
    for (generation, previous) in [(5, 3), (6, 4), (3, 4), (4, 4), (4, 3)] {
        let refused = fits(generation, previous, &[("a", 10), ("b", 20)]);
        assert!(matches!(refused, Err(Error::Document { .. })), "{generation} after {previous}: {refused:?}");
    }
    for files in [
        &[("a", 10), ("c", 20)][..],
        &[("a", 10), ("b", 21)],
        &[("b", 20), ("a", 10)],
        &[("a", 10)],
        &[("a", 10), ("b", 20), ("c", 30)],
    ] {
        let refused = fits(5, 4, files);
        assert!(matches!(refused, Err(Error::Document { .. })), "{files:?}: {refused:?}");
    }
}
