#!/usr/bin/env python3
"""The PTX that apollod carries for a GPU: made from compute/kernels/apollod.cu, or compared with what nvcc makes of it.

usage: kernels.py --check | --write [--nvcc CUDA_HOME] [--kernels FOLDER]

  --check    compile apollod.cu and compare with the committed apollod.ptx
  --write    write apollod.ptx
  CUDA_HOME  a CUDA toolkit of release 13.0; default: what ci/setup_nvcc.sh installs

Either way the PTX is then assembled for each of ARCHITECTURES, as the driver does when it loads it, and a table of what
the assembler says of each kernel is printed. A kernel that keeps registers or arrays in local memory (spills, a stack
frame) fails unless ALLOWED names it and says why.
Exit status: 0 all is well, 1 it is not, 2 the compiler could not run or refused the source.
"""
import argparse
import collections
import concurrent.futures
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# The oldest GPU that runs it; the driver compiles it for any newer one. A product and a sum are one operation only where
# the source says fma: what a GPU computes is then what the tests on a host and the CPU backend do.
PTX_FLAGS = ("--ptx", "-arch=compute_80", "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings")
# Registers of one multiprocessor, and how many of them a warp takes at least at a time.
REGISTERS, REGISTERS_STEP, WARP = 65536, 256, 32
# Kernel -> why it may keep things in local memory. One that no longer does must leave this list.
ALLOWED = {
    "apollo_write_f16": "8 bytes: rounding to f16 takes more registers than to bf16, which is what models are served in",
    "normal_projection": "the table of sine and cosine in f64; it runs once in 200 steps",
}

Usage = collections.namedtuple("Usage", "registers shared stack spills")


class Broken(Exception):
    """The compiler could not run."""


def run(*command, cwd=None):
    """What the command printed. Broken if it fails."""
    try:
        done = subprocess.run([str(c) for c in command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as e:
        raise Broken(f"{command[0]}: {e}") from e
    if done.returncode != 0:
        raise Broken(f"{pathlib.Path(command[0]).name} exited with status {done.returncode}:\n{done.stdout}")
    return done.stdout


def without_paths(ptx):
    """nvcc puts a hash of the source's path into the names of what is local to a file; here it is zeros instead."""
    for found in set(re.findall(r"_INTERNAL_([0-9a-f]{8})_|_GLOBAL__N__([0-9a-f]{8})_", ptx)):
        for digits in filter(None, found):
            ptx = ptx.replace(f"_{digits}_", "_00000000_")
    return ptx


def compile_to_ptx(home, kernels, scratch):
    release = re.search(r"release (\S+),", run(home / "bin" / "nvcc", "--version"))
    if not release or release[1] != "13.0":
        raise Broken(f"{home} is CUDA {release[1] if release else 'of an unknown release'}, want 13.0")
    made = scratch / "apollod.ptx"
    run(home / "bin" / "nvcc", *PTX_FLAGS, "-o", made, "apollod.cu", cwd=kernels)
    return without_paths(made.read_text())


def assemble(home, source, architecture):
    """{function: Usage} for one architecture, by the assembler's own account."""
    report = run(home / "bin" / "ptxas", f"-arch={architecture}", "-v", source, "-o", "/dev/null")
    usage, kernels, name = {}, [], None
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            kernels.append(match[1])
        elif match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage[name] = Usage(0, 0, int(match[1]), int(match[2]) + int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            usage[kernels[-1]] = usage[kernels[-1]]._replace(
                registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    if not kernels or any(usage[k].registers == 0 for k in kernels):
        raise Broken(f"ptxas says nothing of the kernels:\n{report}")
    return usage


def threads_max(registers):
    """The largest block that a kernel of so many registers can be started with."""
    per_warp = -(-registers * WARP // REGISTERS_STEP) * REGISTERS_STEP
    return min(1024, REGISTERS // per_warp * WARP)


def print_table(by_architecture):
    kernels = sorted({name for usage in by_architecture.values() for name, u in usage.items() if u.registers})
    width = max(map(len, kernels))
    print("of each kernel: registers, threads a block can have at most, bytes of static shared memory, of stack + spills")
    print(" " * width + "".join(f"{architecture:>26}" for architecture in by_architecture))
    for name in kernels:
        cells = (usage[name] for usage in by_architecture.values())
        print(f"{name:{width}}" + "".join(
            f"{u.registers:7}{threads_max(u.registers):6}{u.shared:6}{f'{u.stack}+{u.spills}':>7}" for u in cells))


def problems(by_architecture):
    """What is wrong with the kernels: local memory without leave, and leave that nobody needs."""
    local = {}
    for architecture, usage in by_architecture.items():
        for name, u in usage.items():
            if u.stack or u.spills:
                local.setdefault(name, []).append(f"{architecture}: {u.stack} bytes of stack, {u.spills} of spills")
    for name, where in sorted(local.items()):
        if name in ALLOWED:
            print(f"allowed: {name} ({'; '.join(where)}): {ALLOWED[name]}")
        else:
            yield f"{name} keeps values in local memory ({'; '.join(where)})"
    for name in sorted(ALLOWED.keys() - local.keys()):
        yield f"{name} needs no local memory; take it out of ALLOWED in {pathlib.Path(__file__).name}"


def compare(kernels, ptx):
    """What is wrong with the committed file."""
    committed = kernels / "apollod.ptx"
    again = "make it anew with ci/kernels.py --write and commit it"
    if not committed.exists():
        yield f"{committed} is missing; {again}"
        return
    old, new = committed.read_text().splitlines(), ptx.splitlines()
    if old != new:
        at = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        lines = (text[at] if at < len(text) else "(the end)" for text in (old, new))
        yield (f"{committed} is not what nvcc makes of apollod.cu; {again}\n  first difference, line {at + 1}:\n"
               + "\n".join(f"    {who}: {line}" for who, line in zip(("committed", "compiled "), lines)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the committed file")
    what.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--nvcc", type=pathlib.Path, metavar="CUDA_HOME", help="toolkit; default: from setup_nvcc.sh")
    parser.add_argument("--kernels", type=pathlib.Path, default=ROOT / "compute" / "kernels", metavar="FOLDER")
    options = parser.parse_args()
    try:
        home = (options.nvcc or pathlib.Path(subprocess.run(
            [ROOT / "ci" / "setup_nvcc.sh"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip())).absolute()
        with tempfile.TemporaryDirectory() as folder:
            ptx = compile_to_ptx(home, options.kernels, pathlib.Path(folder))
            source = pathlib.Path(folder, "apollod.ptx")
            source.write_text(ptx)
            with concurrent.futures.ThreadPoolExecutor() as pool:
                usages = list(pool.map(lambda a: assemble(home, source, a), ARCHITECTURES))
        by_architecture = dict(zip(ARCHITECTURES, usages))
    except (Broken, subprocess.CalledProcessError) as e:
        print(f"kernels.py: {e}", file=sys.stderr)
        return 2
    print_table(by_architecture)
    found = list(problems(by_architecture))
    if options.write:
        (options.kernels / "apollod.ptx").write_text(ptx)
        print(f"{options.kernels / 'apollod.ptx'}: {len(ptx)} bytes")
    else:
        found += compare(options.kernels, ptx)
    for problem in found:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
