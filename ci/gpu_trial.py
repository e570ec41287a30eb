#!/usr/bin/env python3
"""Tries the parts of ci/gpu.sh that need no real GPU, on the simulated driver: weights offered and opened by CUDA IPC,
a served answer that changes, kills of either side, gradients beside the CPU's.

usage: gpu_trial.py APOLLOD [--kills N] [--only PART,…]

Run it with the interpreter of an environment that has torch, transformers and safetensors (ci/setup_vllm_cpu.sh makes
one). Exit status 0 if everything passed but what NEEDS_A_GPU names, 1 otherwise.
"""
import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOOD = ("PASS", "MEASURED")
NEEDS_A_GPU = ("no device memory is leaked",)


def simulated_driver():
    """The folder of its libcuda.so.1, which a build script compiles."""
    messages = subprocess.run(["cargo", "build", "--locked", "-p", "simulated_driver", "--message-format=json"], cwd=ROOT,
                              stdout=subprocess.PIPE, text=True, check=True).stdout
    for message in map(json.loads, messages.splitlines()):
        if message["reason"] == "build-script-executed" and "simulated_driver" in message["package_id"]:
            return message["out_dir"]
    sys.exit("gpu_trial.py: cargo does not say where the simulated driver is")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod", type=pathlib.Path, help="the apollod binary")
    parser.add_argument("--kills", default="4")
    parser.add_argument("--only", default="live,parity,importer")
    options = parser.parse_args()
    env = dict(os.environ, LD_LIBRARY_PATH=simulated_driver(), PYTHON=sys.executable)
    with tempfile.TemporaryDirectory(prefix="apollod-trial-") as folder:
        build = pathlib.Path(folder, "build")
        (build / "bin").mkdir(parents=True)
        (build / "bin" / "apollod").symlink_to(options.apollod.absolute())
        (build / "build.json").write_text(json.dumps(dict(commit="a trial", peer="none", crates=[], tests=[])))
        out = pathlib.Path(folder, "out")
        subprocess.run([ROOT / "ci" / "gpu.sh", "--device", "simulated", "--build", build, "--out", out, "--only", options.only,
                        "--kills", options.kills, "--patience", "4"], env=env)
        parts = json.loads((out / "results.json").read_text())["parts"]
        bad = [name for part in parts.values() for name, check in part["checks"].items()
               if check["status"] not in GOOD and name not in NEEDS_A_GPU]
        for log in sorted(out.glob("*.log")) if bad else []:
            print(f"--- the end of {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))
    print(f"failed: {'; '.join(bad)}" if bad else "all that needs no GPU passed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
