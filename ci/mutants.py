#!/usr/bin/env python3
"""Plants bugs in checkpoint/, one at a time, in a copy of the tree, and prints which tests notice.

Each has a file, a text that occurs there exactly once (or the n-th time), its replacement, and the step of the protocol.
Exits with 1 if one of them is not noticed, or if a text is not found any more. `--only PART` runs those whose name has
PART in it, `--from N` those from the Nth on; `--list` prints them.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SRC = "checkpoint/src/"

# (name, step, file, text, replacement)
MUTANTS = [
    ("the journal is not synced before its blocks are written", "segment", "segments.rs",
     "            self.writer.sync()?;\n", "            self.writer.hand_over()?;\n"),
    ("the journal's name is not synced before its blocks are written", "segment", "segments.rs",
     "if *self.applied == 0 {", "if *self.applied == 0 && self.held.is_empty() {"),
    ("an error of the last blocks is passed over", "segment", "pipeline.rs", "ended.map(|()| result)", "Ok(result)"),
    ("a failed sync is passed over for another error", "segment", "pipeline.rs",
     "(Err(_), Err(error @ Error::Sync { .. })) | (Err(error), _)", "(Err(error), _)"),
    ("shards are not synced", "segment", "commit.rs", "    shards.sync()?;\n    let tensors", "    let tensors"),
    ("the journal's end is not synced before publishing", "commit", "journal.rs",
     "        self.write(total.as_bytes())?;\n        self.sync()\n",
     "        self.write(total.as_bytes())?;\n        self.hand_over()\n"),
    ("the name of a journal without records is not synced", "commit", "segments.rs",
     "if *self.applied == 0 {", "if *self.applied == 0 && !self.held.is_empty() {"),
    ("the optimizer state is not synced", "commit", "commit.rs",
     "    file.sync()?;\n    file.let_go(0, hasher.count());\n", "    file.let_go(0, hasher.count());\n"),
    ("the name of the optimizer state is not synced", "commit", "commit.rs",
     '    disk.sync_dir(&paths.root.join("state"))?;\n    let sums_blake3 = write_sums(disk, paths, number, &segments.sums)?;',
     "    let sums_blake3 = write_sums(disk, paths, number, &segments.sums)?;"),
    ("the sums are not synced", "commit", "commit.rs", "    file.sync()?;\n    disk.sync_dir", "    disk.sync_dir"),
    ("the name of the sums is not synced", "commit", "commit.rs", 'disk.sync_dir(&paths.root.join("sums"))?;', ""),
    ("a generation is renamed before it is synced", "publish", "disk.rs",
     "        file.sync()?;\n        self.rename(&tmp, path)?;\n",
     "        self.rename(&tmp, path)?;\n        file.sync()?;\n"),
    ("a generation is not synced", "publish", "disk.rs",
     "        file.sync()?;\n        self.rename(&tmp, path)?;\n", "        self.rename(&tmp, path)?;\n"),
    ("a generation's name is not synced", "publish", "disk.rs",
     '        self.rename(&tmp, path)?;\n        self.sync_dir(path.parent().unwrap_or(Path::new(".")))\n',
     "        self.rename(&tmp, path)\n"),
    ("both names of a journal are left", "retire", "commit.rs",
     "        disk.remove(&paths.journal())?;\n    } else {", "    } else {"),
    ("the retired journal's new name is not synced", "retire", "commit.rs",
     '    disk.sync_dir(&paths.root.join("history"))?;\n    disk.sync_dir(&paths.root)\n', "    disk.sync_dir(&paths.root)\n"),
    ("the retired journal's old name is not synced", "retire", "commit.rs",
     '    disk.sync_dir(&paths.root.join("history"))?;\n    disk.sync_dir(&paths.root)\n',
     '    disk.sync_dir(&paths.root.join("history"))\n'),
    ("the name of the newest generation is not synced by recovery", "recovery", "recover.rs",
     'for dir in [&paths.root.join("generations"), &paths.root', "for dir in [&paths.root"),
    ("the names in the history are not synced by recovery", "recovery", "recover.rs",
     '&paths.root.join("history"), &paths.root]', "&paths.root]"),
    ("the journal's names are not synced by recovery", "recovery", "recover.rs",
     '&paths.root.join("history"), &paths.root]', '&paths.root.join("history")]'),
    ("a published generation's journal goes into the history before it is looked at", "recovery", "recover.rs",
     "        return match journal.scan() {", "        return match Ok(()) {"),
    ("undo gives the new content", "undo", "recover.rs",
     "record.settle(content, Side::Old)", "record.settle(content, Side::New)"),
    ("undone shards are not synced", "undo", "recover.rs",
     "    shards.sync()?;\n", ""),
    ("a journal is removed without looking at the files", "undo", "recover.rs",
     "    if let Some(damage) = report.damage.first() {", "    if let Some(damage) = report.damage.first().filter(|_| false) {"),
    ("the removal of an undone journal is not synced", "undo", "recover.rs",
     "    disk.remove(&paths.journal())?;\n    disk.sync_dir(&paths.root)\n}", "    disk.remove(&paths.journal()).map(drop)\n}"),
    ("an undone sync keeps its state and sums", "undo", "recover.rs",
     "[paths.state(undone), paths.sums(undone)]", "[paths.state(undone + 7), paths.sums(undone + 7)]"),
    ("torn sectors are mended where the old comes first only", "undo", "record.rs",
     '[Side::Old, Side::New].into_iter().any(|outside|', '[Side::Old].into_iter().any(|outside|'),
    ("sectors torn twice are not mended", "undo", "record.rs",
     'once.chain(twice).any(', 'once.chain(twice.take(0)).any('),
    ("a frame's checksum is not compared", "checks", "journal.rs",
     "if self.bytes::<8>()? != sum {", "if self.bytes::<8>()? != sum && n == 0 {"),
    ("the total checksum is not compared", "checks", "journal.rs",
     "if &self.bytes::<32>()? != want.as_bytes() {", "if &self.bytes::<32>()? != want.as_bytes() && self.at == 0 {"),
    ("a sector's checksum is not compared", "checks", "record.rs",
     "(sector_sum(sector) == sum).then(|| self.turn", "(sector_sum(sector) == sum || sum != 0).then(|| self.turn"),
    ("a changed block is not compared with its sum", "checks", "compare.rs",
     "None => sums::sum(old) == self.before[job.tensor][block],", "None => true,"),
    ("a changed block that the handle wrote is not compared", "checks", "compare.rs",
     "Some(quick) => sums::quick_sum(old) == quick,", "Some(_) => true,"),
    ("the optimizer state's checksum is not compared", "checks", "checkpoint.rs",
     "|| hasher.finalize().to_hex().as_str() != want.blake3", ""),
    ("a generation's seal is not compared", "checks", "generation.rs",
     "if seal_of(bytes).as_ref() != Some(&generation.seal) {",
     "if seal_of(bytes).as_ref() != Some(&generation.seal) && bytes.is_empty() {"),
    ("the kept generations are one too few", "prune", "retain.rs",
     "oldest(disk, paths, current, keep).and_then",
     "oldest(disk, paths, current, keep).map(|oldest| (oldest + 1).min(current)).and_then"),
    ("the current optimizer state is pruned", "prune", "retain.rs",
     "if number < oldest || number > current {", "if number < oldest || number >= current {"),
]

# What a mutant needs that the crate does not have: to write without a barrier.
HELPER = """
    fn hand_over(&mut self) -> Result<()> {
        self.out.flush().map_err(Error::io("write", &self.path))
    }
"""


def fresh_tree(target):
    """A copy of the tree, in the same place each time: only what differs is compiled again."""
    tree = target / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("target", ".git"), copy_function=shutil.copyfile)
    return tree


def plant(tree, file, text, replacement):
    path = tree / SRC / file
    source = path.read_text()
    if source.count(text) != 1:
        return f"its text occurs {source.count(text)} times in {file}"
    path.write_text(source.replace(text, replacement))
    if "hand_over" in replacement:
        journal = tree / SRC / "journal.rs"
        head = "impl Writer {\n"
        journal.write_text(journal.read_text().replace(head, head + HELPER.replace("fn", "pub(crate) fn", 1), 1))
    return None


# The quick tests come first; one that is noticed by a stage does not meet the next.
STAGES = [
    ["--lib", "--test", "simulation", "--", "--skip", "every_state", "--skip", "barriers::"],
    ["--test", "*", "--", "--skip", "exhaustive::", "--skip", "random::", "--skip", "barriers::"],
    ["--test", "simulation", "--", "every_state", "barriers::"],
]


def killers(tree, target, states):
    """The tests of the first stage in which any fails; none if all pass."""
    env = dict(os.environ, CARGO_TARGET_DIR=str(target), CRASH_STATES=str(states), RUSTFLAGS="-A warnings")
    for stage in STAGES:
        run = ["cargo", "test", "--offline", "-p", "checkpoint", "--no-fail-fast", *stage]
        done = subprocess.run(run, cwd=tree, env=env, capture_output=True, text=True)
        if "error: could not compile" in done.stderr:
            raise SystemExit(f"a mutant does not compile:\n{done.stderr[-3000:]}")
        failed = sorted(set(re.findall(r"^test (\S+) \.\.\. FAILED$", done.stdout, re.M)))
        if failed:
            return failed
    return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--from", type=int, default=1, dest="first", help="number of the first one")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--states", type=int, default=20_000, help="random crash states for each")
    parser.add_argument("--target", type=pathlib.Path, default=ROOT / "target" / "mutants")
    args = parser.parse_args()
    survivors = 0
    print("| planted bug | step | noticed by |\n|---|---|---|")
    for name, step, file, text, replacement in MUTANTS[args.first - 1 :]:
        if args.only not in name:
            continue
        if args.list:
            count = (ROOT / SRC / file).read_text().count(text)
            print(f"| {name} | {step} | {file}: found {count} times |")
            survivors += count != 1
            continue
        tree = fresh_tree(args.target)
        wrong = plant(tree, file, text, replacement)
        noticed = [] if wrong else killers(tree, args.target, args.states)
        survivors += not noticed
        shown = wrong or ", ".join(f"`{test}`" for test in noticed[:3]) + (f" and {len(noticed) - 3} more" if len(noticed) > 3 else "")
        print(f"| {name} | {step} | {shown or '**nothing**'} |", flush=True)
    if survivors:
        sys.exit(f"{survivors} were not noticed")


if __name__ == "__main__":
    main()
