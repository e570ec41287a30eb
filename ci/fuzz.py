#!/usr/bin/env python3
"""Looks for inputs that break what apollod reads from outside: runs the targets of ci/fuzz under libFuzzer, on stable Rust.

An input that ends a target (a panic, too much memory, more than 10 s) is kept under ci/fuzz/regressions/TARGET, where
`cargo test -p fuzz` runs it from then on, and this ends with status 1. What was found to be new stays in target/fuzz/corpus
for the next run. Standard library only.
"""
import argparse
import concurrent.futures
import hashlib
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
REGRESSIONS = ROOT / "ci" / "fuzz" / "regressions"
TARGET_DIR = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
HANG_S = 10
LONGEST_INPUT = 8192
GRACE_S = 60      # for the corpus, which is read first, and for the end


def build():
    """Build the program. Coverage is for the workspace's crates alone, so the dependencies are those of any other build."""
    wrapper = ROOT / "ci" / "fuzz" / "rustc_coverage.sh"
    subprocess.run(["cargo", "build", "--locked", "-p", "fuzz", "--features", "libfuzzer"], cwd=ROOT, check=True,
                   env=dict(os.environ, RUSTC_WORKSPACE_WRAPPER=str(wrapper)))
    return TARGET_DIR / "debug" / "fuzz"


def fuzz(program, name, seconds, seed, scratch):
    """Run one target. Returns (complaint or None, one line of numbers)."""
    corpus, seeds, folder = TARGET_DIR / "fuzz" / "corpus" / name, scratch / f"{name}-seeds", scratch / name
    for path in (corpus, seeds, folder):
        path.mkdir(parents=True, exist_ok=True)
    regressions = REGRESSIONS / name
    command = [program, f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-max_len={LONGEST_INPUT}", f"-seed={seed}",
               f"-dict={seeds}.dict", f"-artifact_prefix={folder}/found-", "-print_final_stats=1", "-rss_limit_mb=4096",
               corpus, seeds, *([regressions] if regressions.is_dir() else [])]
    environment = dict(os.environ, FUZZ_TARGET=name, FUZZ_SEEDS=str(seeds), TMPDIR=str(folder), RUST_BACKTRACE="1")
    try:
        run = subprocess.run([str(word) for word in command], env=environment, stdin=subprocess.DEVNULL, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", timeout=seconds + GRACE_S)
        status, log = run.returncode, run.stdout
    except subprocess.TimeoutExpired as expired:
        status, log = "none in time", (expired.stdout or b"").decode(errors="replace")
    kept = [keep(regressions, path) for path in folder.glob("found-*")]
    number = lambda pattern: (re.findall(pattern, log) or ["?"])[-1]
    numbers = (f"{name:18} {number('number_of_executed_units: *([0-9]+)'):>8} inputs, "
               f"{number('cov: ([0-9]+)'):>6} edges, {number('peak_rss_mb: *([0-9]+)'):>5} MB at most")
    if status == 0 and not kept:
        return None, numbers
    said = "\n".join(log.splitlines()[-40:])
    return f"{name}: ended with status {status}; kept: {', '.join(kept) or 'no input'}\n{said}", numbers


def keep(regressions, found):
    """Copy an input to where it is run from now on."""
    regressions.mkdir(parents=True, exist_ok=True)
    to = regressions / hashlib.sha256(found.read_bytes()).hexdigest()[:16]
    shutil.copyfile(found, to)
    return str(to.relative_to(ROOT))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=20, help="for each target (default 20)")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (default 2)")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 2**31), help="of the mutations (default random)")
    parser.add_argument("--program", help="one that was built before")
    parser.add_argument("targets", nargs="*", help="default: all")
    chosen = parser.parse_args()
    program = chosen.program or build()
    # Without FUZZ_TARGET it names them; libFuzzer's complaints about sanitizers that are not there go nowhere.
    known = subprocess.check_output([program], stderr=subprocess.DEVNULL, text=True).split()
    if wrong := [name for name in chosen.targets if name not in known]:
        parser.error(f"no target {', '.join(wrong)}; there are {', '.join(known)}")
    names = chosen.targets or known
    print(f"seed {chosen.seed}, {len(names)} targets, {chosen.seconds} s each", flush=True)
    start, failed = time.monotonic(), False
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="apollod-fuzz-", dir=memory) as scratch, \
            concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
        runs = [pool.submit(fuzz, program, name, chosen.seconds, chosen.seed, pathlib.Path(scratch)) for name in names]
        for run in concurrent.futures.as_completed(runs):
            complaint, numbers = run.result()
            print(complaint or numbers, flush=True)
            failed |= complaint is not None
    print(f"{'FAILED' if failed else 'no input broke anything'} ({time.monotonic() - start:.0f} s)")
    return failed


if __name__ == "__main__":
    sys.exit(main())
