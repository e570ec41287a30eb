//! Which of the states that a crash may leave are visited: all of them, or some at random.
//!
//! States only become more until a barrier, so [`positions`] are those before each barrier and the end: what a crash
//! anywhere else leaves is among what a crash before the next barrier leaves.
//!
//! [`each`] visits, for every choice of names: the full product of sectors and lengths of all files, if it has at
//! most `limit` states; else for every file all of its own states (or, if those are more than `limit`, each prefix,
//! each suffix and each single sector, at every length) with the other files wholly old or wholly new. Lengths
//! between two are every sector's boundary and one byte beside it. Torn sectors: every one, each version at its head and
//! every other at its tail, torn at a few bytes, with all states of the file's other sectors if they are at most an
//! eighth of `limit`, other files wholly old or wholly new; with [`Tears::EveryByte`] sectors of the model's own files
//! also at every byte, with the file's other sectors wholly old or wholly new and other files new. (The protocol's own
//! files are read whole and compared with a checksum.)

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use crate::choices::{Choices, FileChoice, FilePick, Pick, Torn};
use crate::common::Rng;
use crate::image::{Node, SECTOR};
use crate::medium::Op;

/// Positions in a log whose states hold all others, but for the end the states before a barrier.
pub fn positions(log: &[Op]) -> Vec<usize> {
    let barriers = log.iter().enumerate().filter(|(_, op)| op.is_barrier()).map(|(i, _)| i);
    barriers.chain([log.len()]).collect()
}

/// How much is visited.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// States of one product that are all visited.
    pub limit: usize,
    pub tears: Tears,
}

/// Which torn sectors are visited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tears {
    None,
    Few,
    EveryByte,
}

/// Calls `visit` with each state; the flag is false for those that are only there for the byte at which a sector is torn.
pub type Visit<'a> = &'a mut dyn FnMut(&Pick, bool);

/// Visits states as the module's documentation says.
pub fn each(choices: &Choices, plan: Plan, visit: Visit) {
    let mut names = vec![0; choices.names.len()];
    loop {
        if choices.allows(&names) {
            each_content(choices, &names, plan, visit);
        }
        let turn = (0..names.len()).find(|i| names[*i] + 1 < choices.names[*i].versions.len());
        let Some(turn) = turn else { return };
        names[turn] += 1;
        names[..turn].fill(0);
    }
}

/// Visits the contents that files may have under these names.
fn each_content(choices: &Choices, names: &[usize], plan: Plan, visit: Visit) {
    let limit = plan.limit;
    let mut reached = choices.held.clone();
    for (name, version) in choices.names.iter().zip(names) {
        if let Some(Node::File(file)) = name.versions[*version] {
            reached.insert(file);
        }
    }
    let files = || choices.files.iter().map(|file| file.extreme(false)).collect();
    let mut pick = Pick { names: names.to_vec(), files: files() };
    let open: Vec<usize> = (0..choices.files.len()).filter(|i| reached.contains(&choices.files[*i].file)).collect();
    let all: Vec<Vec<FilePick>> = open.iter().map(|i| whole(&choices.files[*i], limit)).collect();
    let product = all.iter().try_fold(1usize, |product, all| product.checked_mul(all.len()));
    if product.is_some_and(|product| product <= limit) {
        let mut at = vec![0; open.len()];
        loop {
            for ((i, all), at) in open.iter().zip(&all).zip(&at) {
                pick.files[*i] = all[*at].clone();
            }
            visit(&pick, true);
            let Some(turn) = (0..at.len()).find(|i| at[*i] + 1 < all[*i].len()) else { break };
            at[turn] += 1;
            at[..turn].fill(0);
        }
    } else {
        for (i, all) in open.iter().zip(&all) {
            others(choices, &open, *i, &mut pick, &mut |pick| {
                for own in all {
                    pick.files[*i] = own.clone();
                    visit(pick, true);
                }
            });
        }
    }
    for i in open.iter().filter(|_| plan.tears != Tears::None) {
        let few = tears(&choices.files[*i], limit / 8);
        others(choices, &open, *i, &mut pick, &mut |pick| {
            for torn in &few {
                pick.files[*i] = torn.clone();
                visit(pick, true);
            }
        });
        if plan.tears == Tears::EveryByte && choices.files[*i].is_model {
            open.iter().for_each(|i| pick.files[*i] = choices.files[*i].extreme(true));
            for torn in every_tear(&choices.files[*i]) {
                pick.files[*i] = torn;
                visit(&pick, false);
            }
        }
    }
}

/// Calls `with` with all other files wholly old, then with all wholly new.
fn others(choices: &Choices, open: &[usize], but: usize, pick: &mut Pick, with: &mut dyn FnMut(&mut Pick)) {
    let alone = open.len() == 1;
    for new in [true, false].into_iter().take(if alone { 1 } else { 2 }) {
        for i in open.iter().filter(|i| **i != but) {
            pick.files[*i] = choices.files[*i].extreme(new);
        }
        with(pick);
    }
}

/// The lengths that are visited.
fn lengths(file: &FileChoice) -> Vec<usize> {
    let mut all: BTreeSet<usize> = file.lens.iter().copied().collect();
    for pair in file.lens.windows(2).filter(|pair| pair[0] < pair[1]) {
        let boundaries = (pair[0] / SECTOR + 1..=pair[1] / SECTOR).map(|sector| sector * SECTOR);
        let beside = boundaries.flat_map(|at| [at - 1, at, at + 1]).chain([pair[0] + 1, pair[1] - 1]);
        all.extend(beside.filter(|at| (pair[0]..=pair[1]).contains(at)));
    }
    all.into_iter().collect()
}

/// The number of uncertain sectors that begin before a length.
fn below(file: &FileChoice, len: usize) -> usize {
    file.sectors.iter().take_while(|(sector, _)| sector * SECTOR < len).count()
}

/// All states of a file without tears, or those that are visited instead.
fn whole(file: &FileChoice, limit: usize) -> Vec<FilePick> {
    let lens = lengths(file);
    let count = |len: &usize| {
        file.sectors[..below(file, *len)].iter().map(|(_, versions)| versions.len() as f64).product::<f64>()
    };
    let few = lens.iter().map(count).sum::<f64>() <= limit as f64;
    let mut all = Vec::new();
    for len in lens {
        let n = below(file, len);
        let mut add = |sectors: &[usize]| {
            let mut sectors = sectors.to_vec();
            sectors.resize(file.sectors.len(), 0);
            all.push(FilePick { sectors, len, torn: None });
        };
        let newest: Vec<usize> = file.sectors[..n].iter().map(|(_, versions)| versions.len() - 1).collect();
        if few {
            let mut at = vec![0; n];
            loop {
                add(&at);
                let Some(turn) = (0..n).find(|i| at[*i] < newest[*i]) else { break };
                at[turn] += 1;
                at[..turn].fill(0);
            }
            continue;
        }
        for cut in 0..=n {
            let pattern =
                |new: &dyn Fn(usize) -> bool| (0..n).map(|i| if new(i) { newest[i] } else { 0 }).collect::<Vec<_>>();
            add(&pattern(&|i| i < cut));
            add(&pattern(&|i| i >= cut));
            add(&pattern(&|i| i == cut));
            add(&pattern(&|i| i != cut));
        }
    }
    all
}

/// Calls `with` for every two versions of every sector, with the bytes at which a tear between them makes a difference.
fn each_tear(file: &FileChoice, with: &mut dyn FnMut(usize, usize, usize, RangeInclusive<usize>)) {
    for (s, (_, versions)) in file.sectors.iter().enumerate() {
        for head in 0..versions.len() {
            for tail in (0..versions.len()).filter(|tail| *tail != head) {
                let differ = |at: &usize| versions[head][*at] != versions[tail][*at];
                let first = (0..SECTOR).find(differ).expect("versions differ");
                let last = (0..SECTOR).rfind(differ).expect("versions differ");
                with(s, head, tail, first + 1..=last);
            }
        }
    }
}

/// States with a sector torn at a few bytes.
fn tears(file: &FileChoice, limit: usize) -> Vec<FilePick> {
    let longest = FileChoice { lens: vec![file.longest()], sectors: file.sectors.clone(), ..*file };
    let bases = whole(&longest, limit);
    let mut all = Vec::new();
    each_tear(file, &mut |sector, head, tail, at| {
        let (first, last) = (*at.start(), *at.end());
        let middle = (first + last) / 2;
        let few = BTreeSet::from([first, first + 1, middle, middle + 1, last]);
        for at in few.into_iter().filter(|few| at.contains(few)) {
            let torn = Some(Torn { sector, head, tail, at });
            let bases = bases.iter().filter(|base| base.sectors[sector] == 0);
            all.extend(bases.map(|base| FilePick { torn, ..base.clone() }));
        }
    });
    all
}

/// States with a sector torn at every byte.
fn every_tear(file: &FileChoice) -> Vec<FilePick> {
    let mut all = Vec::new();
    each_tear(file, &mut |sector, head, tail, bytes| {
        for at in bytes {
            let torn = Some(Torn { sector, head, tail, at });
            all.extend([true, false].map(|new| FilePick { torn, ..file.extreme(new) }));
        }
    });
    all
}

/// One state at random: each name, file and sector by itself, some files wholly old or wholly new.
pub fn random(choices: &Choices, tears: bool, rng: &mut Rng) -> Pick {
    let mut pick = choices.extreme(rng.below(2) == 0);
    for _ in 0..20 {
        let names: Vec<usize> = choices.names.iter().map(|name| rng.below(name.versions.len())).collect();
        if choices.allows(&names) {
            pick.names = names;
            break;
        }
    }
    for (file, pick) in choices.files.iter().zip(&mut pick.files) {
        *pick = file.extreme(rng.below(2) == 0);
        let newest = match rng.below(4) {
            0 => continue,
            1 => 1 + rng.below(99),
            2 => 50,
            _ => [1, 99][rng.below(2)],
        };
        for (version, (_, versions)) in pick.sectors.iter_mut().zip(&file.sectors) {
            *version = match rng.below(100) < newest {
                true => versions.len() - 1,
                false => rng.below(versions.len() - 1),
            };
        }
        if file.lens.len() > 1 && rng.below(2) == 0 {
            let step = rng.below(file.lens.len() - 1);
            let (from, to) = (file.lens[step], file.lens[step + 1]);
            pick.len = match from < to {
                true => from + rng.below(to - from + 1),
                false => [from, to][rng.below(2)],
            };
            if rng.below(2) == 0 && pick.len / SECTOR * SECTOR >= from.min(to) {
                pick.len = pick.len / SECTOR * SECTOR;
            }
        }
    }
    let open: Vec<usize> = (0..choices.files.len()).filter(|i| !choices.files[*i].sectors.is_empty()).collect();
    if tears && !open.is_empty() && rng.below(3) == 0 {
        let i = open[rng.below(open.len())];
        let sector = rng.below(choices.files[i].sectors.len());
        let versions = choices.files[i].sectors[sector].1.len();
        let head = rng.below(versions);
        let tail = (head + 1 + rng.below(versions - 1)) % versions;
        pick.files[i].torn = Some(Torn { sector, head, tail, at: 1 + rng.below(SECTOR - 1) });
    }
    pick
}
