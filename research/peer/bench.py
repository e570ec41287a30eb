#!/usr/bin/env python3
"""One context-frozen step, apollod and PyTorch in turn: who is faster, by phase, beside the machine's floor.

usage: bench.py --apollod PATH --out DIR [--python PYTHON] [--rounds 5] [--steps 3] [--size 0.6b] [--context 512]
                [--decision 32] [--rank 256] [--dtype bf16]

PYTHON is an interpreter with torch, transformers and apollo-torch; without it, setup.sh beside this makes one. Both
take two threads, or as many as --threads says. Every round is added to DIR/runs.jsonl as it ends; DIR/results.json (medians, least and
most over the rounds) and DIR/step.svg are made of all that are there, so a run that was cut short is worth what it did.
Needs a quiet machine: the load before each round is recorded. Standard library only."""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
# name, apollod's key, the peer's key, colour
PHASES = [("prefill", "prefill_ms", "prefill", "#4477aa"), ("forward", "forward_ms", "fwd", "#66ccee"),
          ("backward", "backward_ms", "bwd", "#228833"), ("update", "update_ms", "opt", "#ccbb44")]
DECISION = ("forward", "backward", "update")


def run_rounds(args, runs):
    python = args.python or subprocess.check_output([HERE / "setup.sh"], text=True).strip().splitlines()[-1]
    ours = [args.apollod, "bench", "step", "--shape", args.shape, "--context", args.context, "--decision", args.decision,
            "--rank", args.rank, "--dtype", args.dtype, "--steps", args.steps, "--threads", args.threads, "--json"]
    peer = [python, HERE / "torch_apollo.py", "--size", args.size, "--dtype", {"f32": "fp32"}.get(args.dtype, args.dtype),
            "--opt", f"apollo{args.rank}", "--modes", "frozen", "--k", args.steps, "--ctx", args.context,
            "--dec", args.decision, "--threads", args.threads]
    for number in range(1, args.rounds + 1):
        round_ = {"round": number, "load": os.getloadavg()[0], "unix": int(time.time())}
        # Who goes first changes, so that neither always finds the machine warmer.
        for name, command in [("apollod", ours), ("peer", peer)][:: 1 if number % 2 else -1]:
            print(f"round {number} of {args.rounds}: {name}", flush=True)
            out = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
            round_[name] = json.loads(out.stdout.strip().splitlines()[-1])
        with open(runs, "a") as file:
            file.write(json.dumps(round_) + "\n")


def spread(values):
    return {"median": round(statistics.median(values), 3), "least": round(min(values), 3), "most": round(max(values), 3)}


def summary(rounds):
    ours = {name: [r["apollod"][key] for r in rounds] for name, key, _, _ in PHASES}
    peer = {name: [r["peer"]["modes"]["frozen"][key] for r in rounds] for name, _, key, _ in PHASES}
    decision = lambda phases: [sum(phases[name][i] for name in DECISION) for i in range(len(rounds))]
    total = lambda phases: [p + d for p, d in zip(phases["prefill"], decision(phases))]
    ratios = lambda of: spread([b / a for a, b in zip(of(ours), of(peer))])
    floor = {"prefill": [r["apollod"]["floor_prefill_ms"] for r in rounds],
             "decision": [r["apollod"]["floor_decision_ms"] for r in rounds]}
    over = lambda of, floors: spread([a / b for a, b in zip(of, floors)])
    both_floors = [p + d for p, d in zip(floor["prefill"], floor["decision"])]
    return {
        "rounds": len(rounds),
        "of": {key: rounds[0]["apollod"].get(key) for key in ("shape", "dtype", "context", "decision", "rank", "device")},
        "apollod_ms": {name: spread(values) for name, values in ours.items()},
        "peer_ms": {name: spread(values) for name, values in peer.items()},
        "floor_ms": {name: spread(values) for name, values in floor.items()},
        "times_as_fast": {"whole": ratios(total), "decision": ratios(decision)},
        "over_floor": {"whole": over(total(ours), both_floors), "decision": over(decision(ours), floor["decision"])},
        "private_mb": {"apollod": spread([r["apollod"]["private_memory_mb"] for r in rounds]),
                       "apollod_state": rounds[0]["apollod"]["optimizer_state_mb"],
                       "peer": spread([r["peer"]["peak_rss_mb"] - r["peer"]["rss_import_mb"] for r in rounds])},
        "load": spread([r["load"] for r in rounds if "load" in r] or [0]),
    }


def picture(result):
    median = lambda phases: {name: value["median"] for name, value in phases.items()}
    floor = result["floor_ms"]
    bars = [("PyTorch + apollo-torch", median(result["peer_ms"])), ("apollod", median(result["apollod_ms"])),
            ("floor", {"prefill": floor["prefill"]["median"], "update": floor["decision"]["median"]})]
    scale = 560 / max(sum(bar.values()) for _, bar in bars)
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 190" font-family="sans-serif" font-size="13">'
           '<rect width="820" height="190" fill="#fff"/>']
    for i, (name, values) in enumerate(bars):
        x, y = 160, 20 + 42 * i
        svg.append(f'<text x="150" y="{y + 19}" text-anchor="end">{name}</text>')
        for phase, _, _, colour in PHASES:
            width = values.get(phase, 0) * scale
            svg.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="28" fill="{colour}"/>')
            x += width
        svg.append(f'<text x="{x + 6:.1f}" y="{y + 19}">{sum(values.values()):.0f} ms</text>')
    for i, (phase, _, _, colour) in enumerate(PHASES):
        x = 160 + 110 * i
        svg.append(f'<rect x="{x}" y="158" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="168">{phase}</text>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--apollod", help="the binary; without it, only results.json and step.svg are made anew")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--python")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--size", default="0.6b", choices=["tiny", "small", "0.6b", "8b"])
    for name, default in [("rounds", 5), ("steps", 3), ("context", 512), ("decision", 32), ("rank", 256), ("threads", 2)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.shape = args.size if args.size in ("tiny", "small") else f"qwen3-{args.size}"
    args.out.mkdir(parents=True, exist_ok=True)
    runs = args.out / "runs.jsonl"
    if args.apollod:
        runs.unlink(missing_ok=True)
        run_rounds(args, runs)
    result = summary([json.loads(line) for line in runs.read_text().splitlines()])
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "step.svg").write_text(picture(result))
    print(json.dumps({key: result[key] for key in ("times_as_fast", "over_floor", "private_mb")}, indent=1))


if __name__ == "__main__":
    main()
