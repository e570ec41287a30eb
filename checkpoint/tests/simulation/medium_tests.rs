//! The model of the medium itself: what it must allow, what it must not, and that it convicts a known bad program.

use std::collections::BTreeSet;
use std::path::Path;

use checkpoint::{Open, Storage};

use crate::common::Rng;
use crate::disk::{Fault, Faults, SimulatedDisk};
use crate::image::Image;
use crate::medium::{Medium, Op};
use crate::states::{self, Plan, Tears};

const FILE: &str = "/d/file.safetensors";
const TMP: &str = "/d/file.tmp";

fn disk_with(content: &[u8]) -> Image {
    let mut image = Image::default();
    image.put(Path::new(FILE), content.to_vec());
    image.put(Path::new("/e/other"), Vec::new());
    image
}

/// What `look` sees in every state after a crash at `position`.
fn seen<T: Ord>(image: &Image, log: &[Op], position: usize, look: impl Fn(&Image) -> T) -> BTreeSet<T> {
    let mut medium = Medium::new(image, true);
    log[..position].iter().for_each(|op| medium.apply(op));
    let choices = medium.choices();
    let mut all = BTreeSet::new();
    states::each(&choices, Plan { limit: 1 << 16, tears: Tears::EveryByte }, &mut |pick, _| {
        all.insert(look(&medium.image(&choices, pick)));
    });
    // What is drawn at random is among them, but for lengths and tears, of which not all are visited.
    let mut rng = Rng(7);
    for _ in 0..500 {
        let mut pick = states::random(&choices, false, &mut rng);
        for (file, pick) in choices.files.iter().zip(&mut pick.files) {
            pick.len = file.extreme(rng.below(2) == 0).len;
        }
        assert!(all.contains(&look(&medium.image(&choices, &pick))), "{}", medium.describe(&choices, &pick));
    }
    all
}

fn content(path: &str) -> impl Fn(&Image) -> Option<Vec<u8>> {
    move |image| image.get(Path::new(path)).map(|bytes| bytes.to_vec())
}

fn write_new(disk: &SimulatedDisk, path: &str, bytes: &[u8], sync: bool) {
    let file = disk.open(Path::new(path), Open::Create).unwrap();
    assert_eq!(file.write_at(bytes, 0).unwrap(), bytes.len());
    if sync {
        file.sync().unwrap();
    }
}

/// Replaces a file by way of a temporary one.
fn replace(disk: &SimulatedDisk, new: &[u8], sync: bool) {
    write_new(disk, TMP, new, sync);
    disk.rename(Path::new(TMP), Path::new(FILE)).unwrap();
    disk.sync_dir(Path::new("/d")).unwrap();
}

#[test]
fn a_replacement_without_a_sync_is_caught_and_one_with_it_passes() {
    let (old, new) = (vec![1; 700], vec![2; 900]);
    let image = disk_with(&old);
    let wrong = |sync| {
        let disk = SimulatedDisk::recording(&image);
        replace(&disk, &new, sync);
        let log = disk.log();
        let mut wrong = 0;
        for position in 0..=log.len() {
            let all = seen(&image, &log, position, content(FILE));
            wrong += all.iter().filter(|is| **is != Some(old.clone()) && **is != Some(new.clone())).count();
        }
        let end = seen(&image, &log, log.len(), content(FILE));
        (wrong, end.contains(&Some(old.clone())))
    };
    assert_eq!(wrong(true), (0, false));
    assert!(wrong(false).0 > 10);
}

#[test]
fn each_sector_is_any_of_its_versions_whatever_the_others_are() {
    let image = disk_with(&[0; 1536]);
    let disk = SimulatedDisk::recording(&image);
    let file = disk.open(Path::new(FILE), Open::InPlace).unwrap();
    file.write_at(&[1; 1024], 0).unwrap();
    file.write_at(&[2; 1024], 512).unwrap();
    let firsts = |image: &Image| {
        let bytes = image.get(Path::new(FILE)).unwrap();
        let whole = bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0]));
        whole.then(|| [bytes[0], bytes[512], bytes[1024]])
    };
    let whole: BTreeSet<[u8; 3]> = seen(&image, &disk.log(), 2, firsts).into_iter().flatten().collect();
    let want = [0, 1].iter().flat_map(|a| [0, 1, 2].iter().flat_map(|b| [0, 2].map(|c| [*a, *b, c])));
    assert_eq!(whole, want.collect());
    file.sync().unwrap();
    assert_eq!(seen(&image, &disk.log(), 3, firsts), BTreeSet::from([Some([1, 2, 2])]));
    // A sector written twice with a barrier between them is never the first again.
    file.write_at(&[3; 512], 0).unwrap();
    let whole: BTreeSet<[u8; 3]> = seen(&image, &disk.log(), 4, firsts).into_iter().flatten().collect();
    assert_eq!(whole, BTreeSet::from([[1, 2, 2], [3, 2, 2]]));
}

#[test]
fn one_sector_at_most_is_torn_at_any_byte() {
    let image = disk_with(&[0; 1024]);
    let disk = SimulatedDisk::recording(&image);
    disk.open(Path::new(FILE), Open::InPlace).unwrap().write_at(&[1; 1024], 0).unwrap();
    let changes = |image: &Image| {
        let bytes = image.get(Path::new(FILE)).unwrap();
        let inside = |at: &usize| !at.is_multiple_of(512) && bytes[*at] != bytes[*at - 1];
        (1..1024).filter(inside).collect::<Vec<_>>()
    };
    let all = seen(&image, &disk.log(), 1, changes);
    assert!(all.iter().all(|torn| torn.len() <= 1));
    assert_eq!(all.len(), 1 + 2 * 511);
}

#[test]
fn a_file_that_grew_has_any_length_between_and_zeros_where_nothing_arrived() {
    let image = disk_with(&[1; 100]);
    let disk = SimulatedDisk::recording(&image);
    disk.open(Path::new(FILE), Open::InPlace).unwrap().write_at(&[1; 1100], 100).unwrap();
    let all: BTreeSet<Vec<u8>> = seen(&image, &disk.log(), 1, content(FILE)).into_iter().flatten().collect();
    let lengths: BTreeSet<usize> = all.iter().map(Vec::len).collect();
    assert_eq!(lengths, BTreeSet::from([100, 101, 511, 512, 513, 1023, 1024, 1025, 1199, 1200]));
    let mut hole = vec![1; 1200];
    hole[512..1024].fill(0);
    assert!(all.contains(&hole));
    assert!(all.iter().all(|bytes| bytes[..100] == [1; 100]));
}

#[test]
fn a_rename_is_old_new_or_both_and_durable_after_both_folders() {
    let image = disk_with(b"a");
    let disk = SimulatedDisk::recording(&image);
    disk.rename(Path::new(FILE), Path::new("/e/moved")).unwrap();
    let there = |image: &Image| [FILE, "/e/moved"].map(|path| image.node(Path::new(path)).is_some());
    let open = BTreeSet::from([[true, false], [true, true], [false, true]]);
    assert_eq!(seen(&image, &disk.log(), 1, there), open);
    disk.sync_dir(Path::new("/e")).unwrap();
    assert_eq!(seen(&image, &disk.log(), 2, there), open);
    disk.sync_dir(Path::new("/d")).unwrap();
    assert_eq!(seen(&image, &disk.log(), 3, there), BTreeSet::from([[false, true]]));
}

#[test]
fn names_are_in_any_order_but_for_the_same_name() {
    let image = disk_with(b"a");
    let disk = SimulatedDisk::recording(&image);
    disk.create_dir(Path::new("/d/new")).unwrap();
    write_new(&disk, "/d/new/x", b"x", true);
    disk.remove(Path::new(FILE)).unwrap();
    write_new(&disk, FILE, b"b", true);
    let look = |image: &Image| {
        (image.node(Path::new("/d/new")).is_some(), image.node(Path::new("/d/new/x")).is_some(), content(FILE)(image))
    };
    let all = seen(&image, &disk.log(), disk.len(), look);
    // A file needs its folder; the removed file may be there, be gone, or be the one after it.
    let folders = [(false, false), (true, false), (true, true)];
    let files = [Some(b"a".to_vec()), None, Some(b"b".to_vec())];
    let want = folders.iter().flat_map(|(dir, file)| files.iter().map(|content| (*dir, *file, content.clone())));
    assert_eq!(all, want.collect());
}

#[test]
fn what_a_failed_sync_let_go_is_never_made_durable_unless_written_again() {
    let image = disk_with(&[0; 512]);
    let faults = Faults { short: None, fail: Some((Fault::Sync, 0)) };
    let disk = SimulatedDisk::with(&image, true, faults);
    let file = disk.open(Path::new(FILE), Open::InPlace).unwrap();
    file.write_at(&[1; 512], 0).unwrap();
    assert_eq!(file.sync().unwrap_err().raw_os_error(), Some(5));
    file.sync().unwrap();
    let mut byte = [0];
    file.read_at(&mut byte, 100).unwrap();
    assert_eq!(byte, [1], "reads show it");
    let both = BTreeSet::from([Some(vec![0; 512]), Some(vec![1; 512])]);
    let whole = |all: BTreeSet<Option<Vec<u8>>>| -> BTreeSet<_> {
        all.into_iter().filter(|bytes| bytes.as_ref().is_some_and(|bytes| bytes[0] == bytes[511])).collect()
    };
    assert_eq!(whole(seen(&image, &disk.log(), 3, content(FILE))), both);
    file.write_at(&[1; 512], 0).unwrap();
    file.sync().unwrap();
    assert_eq!(seen(&image, &disk.log(), 5, content(FILE)), BTreeSet::from([Some(vec![1; 512])]));
}

#[test]
fn a_failed_sync_of_a_folder_leaves_its_names_open_until_one_succeeds() {
    let image = disk_with(b"a");
    let faults = Faults { short: None, fail: Some((Fault::Sync, 0)) };
    let disk = SimulatedDisk::with(&image, true, faults);
    disk.remove(Path::new(FILE)).unwrap();
    assert!(disk.sync_dir(Path::new("/d")).is_err());
    let all = |position| seen(&image, &disk.log(), position, content(FILE));
    assert_eq!(all(2), BTreeSet::from([None, Some(b"a".to_vec())]));
    disk.sync_dir(Path::new("/d")).unwrap();
    assert_eq!(all(3), BTreeSet::from([None]));
}

#[test]
fn faults_are_the_system_s_errors() {
    let image = disk_with(b"abc");
    let fails = |fault, after, codes: [Option<i32>; 3]| {
        let disk = SimulatedDisk::with(&image, false, Faults { short: None, fail: Some((fault, after)) });
        let file = disk.open(Path::new(FILE), Open::InPlace);
        let write = |_| match &file {
            Ok(file) => file.write_at(b"x", 0).err(),
            Err(error) => Some(std::io::Error::from(error.kind())),
        };
        let is = [0, 1, 2].map(write).map(|error| error.map(|error| error.kind()));
        assert_eq!(is, codes.map(|code| code.map(|code| std::io::Error::from_raw_os_error(code).kind())), "{fault:?}");
    };
    fails(Fault::NoSpace, 1, [None, Some(28), Some(28)]);
    fails(Fault::Write, 1, [None, Some(5), None]);
    fails(Fault::ReadOnly, 0, [Some(30); 3]);
    fails(Fault::ReadOnly, 2, [None, Some(30), Some(30)]);
    let disk = SimulatedDisk::with(&image, false, Faults { short: Some(1), fail: Some((Fault::Read, 2)) });
    let file = disk.open(Path::new(FILE), Open::Read).unwrap();
    let mut buf = [0; 3];
    let read = [0, 1, 2].map(|_| file.read_at(&mut buf, 0).ok());
    assert!(read[0].is_some() && read[1].is_some() && read[2].is_none());
}

#[test]
fn a_lock_ends_with_its_handle() {
    let disk = SimulatedDisk::new(&disk_with(b""));
    let open = || disk.open(Path::new("/d/lock"), Open::Lock).unwrap();
    let (first, second) = (open(), open());
    assert!(first.try_lock(true).unwrap());
    assert!(!second.try_lock(true).unwrap() && !second.try_lock(false).unwrap());
    drop(first);
    assert!(second.try_lock(false).unwrap() && open().try_lock(false).unwrap());
    assert!(!open().try_lock(true).unwrap());
}
