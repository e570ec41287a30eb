#!/usr/bin/env python3
"""Runs the parts on a GPU, each within its time, and writes what they found to DIR/results.json.

A part that fails, hangs or crashes does not stop the others. What could not run is said so and never counts as passed.
`--device simulated` runs the same on the CPU with the CUDA driver that LD_LIBRARY_PATH leads to, `--device cpu` without
one: both are trials of these scripts, and no figure of theirs says anything of a GPU.
"""
import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CANNOT_RUN = "CANNOT RUN"
# Part: (script, seconds). Those of a group run one after the other; groups of a stage run side by side. The first stage
# is about right and wrong, where it does not matter who else uses the GPU; the others measure.
PARTS = {
    "live": ("live.py", 225), "tests": ("rust_tests.py", 100), "parity": ("parity.py", 70), "importer": ("importer.py", 40),
    "bench": ("bench.py", 165), "cost": ("cost.py", 70),
}
STAGES = ((("live",), ("tests", "parity", "importer")), (("bench",),), (("cost",),))
# After SIGTERM, a part stops what it has started.
PATIENCE_S = 8
PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path,
                        help="what `just gpu-build` made; default: the folder this is in, or target/gpu")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT") or "gpu-results"),
                        help="where results and logs go; default $OUT or ./gpu-results")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), metavar="PART,…",
                        help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cuda", "simulated", "cpu"), default="cuda")
    parser.add_argument("--kills", type=int, default=100, help="of program and trainer together; default 100")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shapes", default="qwen3-0.6b,qwen3-8b", help="of bench; default %(default)s")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on the time of every part; default 1")
    options = parser.parse_args()
    if wrong := [part for part in options.only if part not in PARTS]:
        parser.error(f"no part is called {', '.join(wrong)}; there are {', '.join(PARTS)}")
    if options.build is None:
        options.build = ROOT if (ROOT / "build.json").exists() else ROOT / "target" / "gpu"
    options.build = options.build.absolute()
    if not (options.build / "build.json").exists():
        parser.error(f"{options.build} is not what `just gpu-build` makes; say --build FOLDER")
    options.out = options.out.absolute()
    return options


def nvidia_smi(*fields):
    """What it says of the first GPU, or None."""
    try:
        text = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                              capture_output=True, text=True, timeout=30, check=True).stdout
        return dict(zip(fields, (field.strip() for field in text.splitlines()[0].split(","))))
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def machine(build):
    """What the results were found with."""
    versions = {"python": platform.python_version(), "apollo-torch": build["peer"].partition("==")[2]}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return dict(gpu=nvidia_smi("name", "driver_version", "memory.total", "uuid"), versions=versions, system=platform.platform(),
                glibc=platform.libc_ver()[1], cores=os.cpu_count())


def cuda_libraries():
    """Folders with CUDA's libraries that pip has installed beside torch; apollod finds those of the system by itself."""
    found = importlib.util.find_spec("nvidia")
    folders = found.submodule_search_locations if found else []
    return sorted({str(file.parent) for folder in folders for file in pathlib.Path(folder).glob("*/lib/libcublasLt.so.*")})


def first_start(options):
    """Seconds of two starts of apollod on the GPU: with the first the driver compiles the kernels and keeps the result. Done
    before everything else, since no part should be measured while another one waits for that."""
    command = [options.build / "bin" / "apollod", "bench", "scan", "--device", "cuda", "--bytes", str(1 << 26), "--json"]
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            failed = done.returncode and (done.stderr or done.stdout)[-1500:]
        except (OSError, subprocess.TimeoutExpired) as e:
            failed = str(e)
        seconds.append(round(time.monotonic() - start, 2))
        if failed:
            print(f"apollod does not start on the GPU: {failed}", flush=True)
            return dict(seconds=seconds, failed=failed)
    print(f"apollod starts on the GPU in {seconds[0]} s the first time, then in {seconds[1]} s", flush=True)
    return dict(seconds=seconds)


class Part:
    """A part's process."""

    def __init__(self, name, options, work, memory_mb):
        self.name, self.result, self.options = name, work / f"{name}.json", options
        script, seconds = PARTS[name]
        self.seconds = seconds * options.patience
        folder = work / name
        folder.mkdir()
        command = [sys.executable, HERE / script, "--build", options.build, "--work", folder, "--out", self.result,
                   "--device", options.device, "--seconds", self.seconds, "--kills", options.kills, "--seed", options.seed,
                   "--shapes", options.shapes]
        if memory_mb is not None:
            command += ["--memory-mb-before", memory_mb]
        wheels = [str(path) for path in sorted((options.build / "wheels").glob("*.whl"))]
        path = os.pathsep.join(wheels + list(filter(None, [os.environ.get("PYTHONPATH")])))
        env = dict(os.environ, PYTHONPATH=path, PYTHONUNBUFFERED="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
        self.log, self.start = options.out / f"{name}.log", time.monotonic()
        self.process = subprocess.Popen([str(c) for c in command], stdout=self.log.open("w"), stderr=subprocess.STDOUT,
                                        stdin=subprocess.DEVNULL, env=env, start_new_session=True)

    def over(self):
        """Whether it has ended; it is ended when its time is up."""
        spent = time.monotonic() - self.start
        if self.process.poll() is None and spent > self.seconds:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                pass
        elif self.process.poll() is None:
            return False
        # The group is the part's own, whatever is left of it.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        return True

    def found(self):
        try:
            found = json.loads(self.result.read_text())
        except (OSError, ValueError):
            found = dict(checks={self.name: dict(status=CANNOT_RUN, detail="the part ended before its first check")}, data={})
        found["seconds"] = round(time.monotonic() - self.start, 1)
        found["exit_status"] = self.process.returncode
        if self.process.returncode not in (0, 143, -signal.SIGTERM):
            text = self.log.read_text(errors="replace").splitlines()
            found["end_of_log"] = text[-20:]
        return found


def run_stage(stage, options, work, memory_mb):
    """{part: what it found}. The groups side by side."""
    waiting = [[part for part in group if part in options.only] for group in stage]
    running, found = {}, {}
    while any(waiting) or running:
        for number, group in enumerate(waiting):
            if number not in running and group:
                running[number] = Part(group.pop(0), options, work, memory_mb)
        for number, part in list(running.items()):
            if part.over():
                found[part.name] = part.found()
                show(part.name, found[part.name])
                del running[number]
        time.sleep(0.1)
    return found


def show(name, found):
    print(f"\n== {name} ({found['seconds']} s)", flush=True)
    for check, result in found["checks"].items():
        print(f"{result['status']:10} {check}: {result['detail']}", flush=True)
    for line in found.get("end_of_log", []):
        print(f"    | {line}", flush=True)


def main():
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    build = json.loads((options.build / "build.json").read_text())
    start, memory = time.monotonic(), nvidia_smi("memory.used")
    results = dict(date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), device=options.device,
                   kills=options.kills, seed=options.seed, **machine(build), build=build, parts={})
    if options.device != "cuda":
        results["trial"] = "made without a GPU: it tries the scripts and says nothing of one"
    shown = {key: results[key] for key in ("date", "device", "gpu", "versions")}
    print(json.dumps(shown), f"commit {build['commit']}", flush=True)
    if options.device == "cuda":
        os.environ.setdefault("APOLLOD_CUDA_LIBRARIES", os.pathsep.join(cuda_libraries()))
        results["cuda_libraries"] = os.environ["APOLLOD_CUDA_LIBRARIES"]
        results["first_start"] = first_start(options)
        memory = nvidia_smi("memory.used")
    # Results go back at most 16 MiB a file: models and weights stay in a folder that is removed.
    with tempfile.TemporaryDirectory(prefix="apollod-gpu-") as work:
        for stage in STAGES:
            found = run_stage(stage, options, pathlib.Path(work), memory and int(memory["memory.used"]))
            results["parts"] |= found
            statuses = [check["status"] for part in results["parts"].values() for check in part["checks"].values()]
            results["counts"] = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
            results["seconds"] = round(time.monotonic() - start, 1)
            (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    skipped = [part for part in PARTS if part not in options.only]
    print("\n" + ", ".join(f"{n} {status}" for status, n in results.get("counts", {}).items())
          + (f"; not asked for: {', '.join(skipped)}" if skipped else "")
          + f"; {results['seconds']} s; {options.out / 'results.json'}", flush=True)
    if any(s in results["counts"] for s in ("FAIL", "MISSED")):
        return 1
    return 2 if CANNOT_RUN in results["counts"] else 0


if __name__ == "__main__":
    sys.exit(main())
