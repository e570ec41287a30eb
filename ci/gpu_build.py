#!/usr/bin/env python3
"""Collects what ci/gpu.sh needs on a machine with a GPU and without Rust or network, in one folder.

usage: gpu_build.py [FOLDER]      default: target/gpu; it is made anew

In it, under the paths that they have here: apollod and the test programs that have tests for CUDA (release builds,
stripped), the scripts and the plugin's sources, the small models that they use, and apollo-torch as a wheel. build.json
says from which commit. Needs Rust, strip (binutils), and python3 with pip and a network or a cache for the one wheel.
"""
import datetime
import json
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Crates with tests for CUDA, and what is copied beside the programs.
CRATES = ("compute", "apollo", "model", "ipc")
FILES = ("ci/gpu.sh", "ci/gpu", "ci/e2e/harness.py", "ci/e2e/daemon.py", "ipc/vllm_plugin/src/apollod", "research/peer",
         "research/demo_model/model", "research/2026-11-21-cuda-ipc", "model/tests/goldens", "apollo/tests/goldens")
PEER = "apollo-torch==1.0.3"
BYTES_MAX = 60_000_000


def run(*command, **more):
    return subprocess.run([str(c) for c in command], cwd=ROOT, check=True, **more)


def output_of(*command):
    return run(*command, stdout=subprocess.PIPE, text=True).stdout


def test_programs():
    """(crate, name, path) of each that cargo makes."""
    packages = [word for crate in CRATES for word in ("-p", crate)]
    messages = output_of("cargo", "test", "--release", "--locked", "--no-run", "--message-format=json", *packages)
    for line in messages.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            folder = pathlib.Path(message["manifest_path"]).parent.relative_to(ROOT)
            if "cuda" in message["target"]["name"] or "cuda" in output_of(message["executable"], "--list"):
                yield str(folder), message["target"]["name"], pathlib.Path(message["executable"])


def main():
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) == 2 else ROOT / "target" / "gpu").absolute()
    if folder.exists():
        if not (folder / "build.json").exists():
            sys.exit(f"gpu_build.py: {folder} exists and is none of this script's; name another folder")
        shutil.rmtree(folder)
    run("cargo", "build", "--release", "--locked", "-p", "daemon")
    (folder / "bin" / "tests").mkdir(parents=True)
    metadata = json.loads(output_of("cargo", "metadata", "--format-version=1", "--no-deps", "--locked"))
    run("strip", "-o", folder / "bin" / "apollod", pathlib.Path(metadata["target_directory"], "release", "apollod"))
    tests = []
    for crate, name, program in test_programs():
        file = f"bin/tests/{crate.replace('/', '-')}-{name}"
        run("strip", "-o", folder / file, program)
        # The folder that the tests run in, where cargo runs them.
        (folder / crate).mkdir(parents=True, exist_ok=True)
        tests.append(dict(crate=crate, name=name, file=file))
    for file in FILES:
        if (ROOT / file).is_dir():
            shutil.copytree(ROOT / file, folder / file, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif (ROOT / file).exists():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
        else:
            sys.exit(f"gpu_build.py: {file} is missing")
    # The peer's wheel is plain Python and is imported from the file.
    run(sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:",
        "--dest", folder / "wheels", PEER)
    commit = output_of("git", "rev-parse", "HEAD").strip()
    changed = output_of("git", "status", "--porcelain").splitlines()
    build = dict(commit=commit, changed_files=[line[3:] for line in changed], peer=PEER,
                 built=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                 rustc=output_of("rustc", "--version").strip(), crates=CRATES, tests=tests)
    (folder / "build.json").write_text(json.dumps(build, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB, {len(tests)} test programs, commit {commit[:12]}"
          + (f" with {len(changed)} changed files" if changed else ""))
    if size > BYTES_MAX:
        largest = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: -p.stat().st_size)[:8]
        sys.exit("gpu_build.py: more than 60 MB; the largest:\n"
                 + "\n".join(f"  {p.stat().st_size / 1e6:6.1f} MB  {p.relative_to(folder)}" for p in largest))


if __name__ == "__main__":
    main()
