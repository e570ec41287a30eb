#!/usr/bin/env python3
"""Compare `apollod grads` with transformers on random models that it has never seen.

usage: check_grads.py APOLLOD [--seed N] [--rounds N] [--committed] [--keep DIR]

Run it with the interpreter of an environment that has torch, transformers and safetensors (ci/setup_transformers.sh
makes one). Each round makes fresh models, two of each family (model/tests/goldens/make.py --random SEED), runs
`apollod grads --dtype f32` on each, and compares the loss and every gradient: relative error at most 1e-4. The seed is
drawn from the clock and printed; --seed repeats a run. --committed compares the committed cases as well.
Exit status 0 if all agree, 1 if any does not (the worst are named), 2 if apollod or the reference could not run.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from safetensors.torch import load_file

TOLERANCE = 1e-4    # relative: ||got - want|| / ||want||
# A gradient smaller than this part of the whole model's is zero but for rounding (with a single key the softmax is 1,
# whatever q and k are); its error is measured against this part instead.
NEGLIGIBLE = 1e-6
GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "model" / "tests" / "goldens"


class Broken(Exception):
    """The comparison could not be made."""


def run(command, limit_s=600):
    """Standard output of `command`; Broken if it fails."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=limit_s)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise Broken(f"{command[0]}: {e}") from e
    if done.returncode != 0:
        raise Broken(f"{' '.join(map(str, command))}\nexit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def split_by_example(tensors):
    """{"{i}.{name}": t} -> [{name: t}], in the order of i."""
    examples = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        examples.setdefault(int(index), {})[name] = tensor
    return [examples[i] for i in sorted(examples)]


def compare(case, printed, got, want, decision_lengths):
    """Rows (error, case, example, what) of one case; an error of infinity for what is missing, extra or misshapen."""
    infinity, rows = float("inf"), []
    if not len(printed) == len(got) == len(want):
        return [(infinity, case, 0, f"{len(printed)} examples printed, {len(got)} written, {len(want)} wanted")]
    for i, (line, mine, theirs) in enumerate(zip(printed, got, want)):
        loss = theirs.pop("loss").item()
        theirs.pop("logits")
        rows.append((abs(line["loss"] - loss) / abs(loss), case, i, f"loss {line['loss']}, want {loss}"))
        if line["tokens"] != decision_lengths[i]:
            rows.append((infinity, case, i, f"tokens {line['tokens']}, want {decision_lengths[i]}"))
        whole = sum(g.double().norm() ** 2 for g in theirs.values()) ** 0.5
        for name in sorted(mine.keys() | theirs.keys()):
            if name not in mine or name not in theirs:
                rows.append((infinity, case, i, f"{name} is {'missing' if name in theirs else 'not in the model'}"))
            elif mine[name].shape != theirs[name].shape:
                rows.append((infinity, case, i, f"{name} is {list(mine[name].shape)}, want {list(theirs[name].shape)}"))
            else:
                a, b = mine[name].double(), theirs[name].double()
                error = ((a - b).norm() / max(b.norm(), NEGLIGIBLE * whole)).item()
                rows.append((error if error == error else infinity, case, i, name))
    return rows


def check_case(apollod, folder, scratch):
    """Run `apollod grads` on the case in `folder` and compare."""
    out = scratch / f"{folder.name}.safetensors"
    examples = folder / "examples.jsonl"
    stdout = run([apollod, "grads", "--model", folder, "--examples", examples, "--out", out, "--dtype", "f32"])
    try:
        printed = json.loads(stdout)["examples"]
        got = split_by_example(load_file(out))
    except (ValueError, KeyError, OSError) as e:
        raise Broken(f"{folder.name}: apollod grads exited 0 but its output cannot be read: {e!r}\n{stdout[-2000:]}") from e
    lengths = [len(json.loads(line)["decision_ids"]) for line in examples.read_text().splitlines()]
    return compare(folder.name, printed, got, split_by_example(load_file(folder / "expected.safetensors")), lengths)


def report(rows):
    """Print the worst of each case, then every failure up to a page. Returns whether all passed."""
    print(f"{'case':22}{'compared':>9}{'worst':>10}  example: what")
    for case in dict.fromkeys(row[1] for row in rows):
        mine = [row for row in rows if row[1] == case]
        error, _, i, what = max(mine)
        print(f"{case:22}{len(mine):9}{error:10.1e}  {i}: {what}")
    failed = sorted((row for row in rows if not row[0] <= TOLERANCE), reverse=True)
    if failed:
        print(f"\n{len(failed)} of {len(rows)} differ by more than {TOLERANCE}; the worst:")
        for error, case, i, what in failed[:40]:
            print(f"  {error:9.1e}  {case} example {i}: {what}")
    else:
        print(f"\nall {len(rows)} losses and gradients agree within {TOLERANCE}")
    return not failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod", type=pathlib.Path, help="the apollod binary")
    parser.add_argument("--seed", type=int, help="seed of the first round; default: from the clock")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of eight models")
    parser.add_argument("--committed", action="store_true", help="compare the committed cases as well")
    parser.add_argument("--keep", type=pathlib.Path, help="leave models and gradients here; default: a temporary folder")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int(time.time())
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.keep or pathlib.Path(temporary)
        scratch.mkdir(parents=True, exist_ok=True)
        rows = []
        try:
            folders = sorted(p.parent for p in GOLDENS.glob("*/expected.safetensors")) if options.committed else []
            for n in range(seed, seed + options.rounds):
                models = scratch / f"seed_{n}"
                run([sys.executable, GOLDENS / "make.py", "--random", n, "--out", models])
                folders += sorted(p.parent for p in models.glob("*/expected.safetensors"))
            for folder in folders:
                rows += check_case(options.apollod, folder, scratch)
        except Broken as e:
            print(f"could not compare: {e}", file=sys.stderr)
            return 2
        return 0 if report(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
