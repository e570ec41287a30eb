"""The training step beside PyTorch with transformers and apollo-torch, and beside the floor of this GPU.

floor of the decision part = (4 * bytes of W + 2 * bytes of optimizer state) / bandwidth of a device-to-device copy, bytes
read and written counted, measured here between the others. W: the matrices that APOLLO trains; their state is
8 * r * max(m, n) bytes, r = min(rank, m, n).
"""
import statistics
import sys
import time

import torch

from report import MEASURED, MET, ROOT, Broken, Report, json_line, options, output_of

# (hidden, layers, intermediate, heads, kv heads, head dim, vocabulary, tied), and the peer's name for it
SHAPES = {
    "tiny": ((256, 4, 768, 4, 2, 64, 8192, True), "tiny"),
    "small": ((512, 8, 1536, 8, 4, 64, 32000, False), "small"),
    "qwen3-0.6b": ((1024, 28, 3072, 16, 8, 128, 151936, True), "0.6b"),
    "qwen3-8b": ((4096, 36, 12288, 32, 8, 128, 151936, False), "8b"),
}
# decision part over its floor, at most
FLOORS_MAX = {"qwen3-0.6b": 3.0, "qwen3-8b": 1.5}
PEER_MIN = 5.0
MEMORY_MAX = {64: 0.10, 256: 0.30}      # of the weights, for 8b
SCAN_MIN, IDLE_SYNC_MS_MAX, SCAN_BYTES = 0.8, 20.0, 16_000_000_000
CONTEXT, DECISION, RANK = 512, 32, 256
COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20, "simulated": 64 << 20}


def matrices(shape):
    """(m, n) of every matrix that APOLLO trains. An untied token embedding is not one: a step touches a few of its rows."""
    h, layers, ffn, heads, kv, dim, vocab, _ = SHAPES[shape][0]
    layer = [(heads * dim, h), (kv * dim, h), (kv * dim, h), (h, heads * dim), (ffn, h), (ffn, h), (h, ffn)]
    return layer * layers + [(vocab, h)]


def all_bytes(shape):
    """Of the whole model in bf16."""
    h, _, _, _, _, _, vocab, tied = SHAPES[shape][0]
    return 2 * (sum(m * n for m, n in matrices(shape)) + (0 if tied else vocab * h))


def floor_ms(shape, rank, bytes_per_s):
    state = sum(8 * min(rank, m, n) * max(m, n) for m, n in matrices(shape))
    weights = 2 * sum(m * n for m, n in matrices(shape))
    return 1e3 * (4 * weights + 2 * state) / bytes_per_s


def copy_bandwidth(device):
    """Bytes read and written per second by a copy within the device's memory, median of 10."""
    size = COPY_BYTES[device]
    on = "cuda" if device == "cuda" else "cpu"
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=on)
    target, seconds = torch.empty_like(source), []
    for _ in range(13):
        if on == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begun = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - begun)
    del source, target
    if on == "cuda":
        torch.cuda.empty_cache()
    return 2 * size / statistics.median(seconds[3:])


def ours(options, shape, rank, steps):
    words = ["bench", "step", *options.on_device, "--shape", shape, "--context", CONTEXT, "--decision", DECISION,
             "--rank", rank, "--dtype", "bf16", "--steps", steps, "--json"]
    found = json_line(output_of([options.apollod, *words], 120))
    # Of the whole step, since where a GPU's phases meet is told less well than where the step ends.
    found["decision_ms"] = found["total_ms"] - found["prefill_ms"]
    return found


def peer(options, shape, rank, steps):
    device = "cuda" if options.device == "cuda" else "cpu"
    script = ROOT / "research" / "peer" / "torch_apollo.py"
    found = json_line(output_of(
        [sys.executable, script, "--size", SHAPES[shape][1], "--dtype", "bf16", "--opt", f"apollo{rank}", "--modes", "frozen",
         "--k", steps, "--warm", 2, "--ctx", CONTEXT, "--dec", DECISION, "--device", device], 150))
    phases = found["modes"]["frozen"]
    return dict(found, decision_ms=phases["fwd"] + phases["bwd"] + phases["opt"], prefill_ms=phases["prefill"])


def in_turn(report, shape):
    """ours, peer, ours, peer, with the copy in between; the medians of each."""
    rounds = 2 if shape != "qwen3-8b" else 1
    mine, theirs, copies = [], [], []
    for _ in range(rounds):
        copies.append(copy_bandwidth(report.options.device))
        mine.append(ours(report.options, shape, RANK, 20))
        copies.append(copy_bandwidth(report.options.device))
        theirs.append(peer(report.options, shape, RANK, 5))
    report.keep(f"{shape} in turn", dict(apollod=mine, peer=theirs, copy_bytes_per_s=copies))
    bandwidth = statistics.median(copies)
    middle = lambda runs, key: statistics.median(run[key] for run in runs)
    found = dict(ours_ms=middle(mine, "decision_ms"), peer_ms=middle(theirs, "decision_ms"),
                 prefill_ms=middle(mine, "prefill_ms"), peer_prefill_ms=middle(theirs, "prefill_ms"),
                 floor_ms=floor_ms(shape, RANK, bandwidth), copy_gb_per_s=bandwidth / 1e9)
    found |= dict(peer_over_ours=found["peer_ms"] / found["ours_ms"], ours_over_floor=found["ours_ms"] / found["floor_ms"])
    report.keep(shape, {k: round(v, 3) for k, v in found.items()})
    return found


def beside_floor(report, shape, figures):
    figures.update(in_turn(report, shape))
    most = FLOORS_MAX.get(shape)
    detail = (f"decision {figures['ours_ms']:.2f} ms, floor {figures['floor_ms']:.2f} ms at "
              f"{figures['copy_gb_per_s']:.0f} GB/s: {figures['ours_over_floor']:.2f} times" + (f", want at most {most}" if most else ""))
    return (report.target(figures["ours_over_floor"] <= most) if most else MEASURED), detail


def beside_peer(report, figures):
    if not figures:
        raise Broken("there are no figures")
    return report.target(figures["peer_over_ours"] >= PEER_MIN), (
        f"PyTorch takes {figures['peer_ms']:.1f} ms for the decision part: {figures['peer_over_ours']:.1f} times, "
        f"want at least {PEER_MIN}; prefill {figures['prefill_ms']:.1f} ms, PyTorch {figures['peer_prefill_ms']:.1f} ms")


def memory(report, shape, rank):
    """Device memory besides the weights, context cache included, as apollod counts it."""
    before = report.data.get(f"{shape} in turn")
    found = before["apollod"][0] if before and rank == RANK else ours(report.options, shape, rank, 2)
    report.keep(f"{shape} rank {rank} memory", found)
    part = found["private_memory_mb"] * 1e6 / all_bytes(shape)
    return report.target(part < MEMORY_MAX[rank]), (
        f"{found['private_memory_mb']:.0f} MB besides the weights, {100 * part:.1f}% of them, "
        f"want under {100 * MEMORY_MAX[rank]:.0f}%")


def scan(report, figures):
    """What an idle sync does on the GPU: every byte is read and hashed once, and no block is found to have changed."""
    words = ["bench", "scan", *report.options.on_device, "--bytes", SCAN_BYTES if report.options.device == "cuda" else 1 << 26]
    found = json_line(output_of([report.options.apollod, *words, "--json"], 60))
    report.keep("scan", found)
    bandwidth = copy_bandwidth(report.options.device)
    figures.update(found, part=found["bytes"] / (found["scan_ms"] / 1e3) / bandwidth)
    return report.target(figures["part"] >= SCAN_MIN), (
        f"{found['bytes'] / 1e9:.1f} GB in {found['scan_ms']:.2f} ms: {100 * figures['part']:.0f}% of the copy's "
        f"{bandwidth / 1e9:.0f} GB/s, want at least {100 * SCAN_MIN:.0f}%")


def idle_sync(report, figures):
    if "scan_ms" not in figures:
        raise Broken("there is no scan")
    return report.target(figures["scan_ms"] < IDLE_SYNC_MS_MAX), (
        f"{figures['scan_ms']:.2f} ms of GPU time for {figures['bytes'] / 1e9:.1f} GB, want under {IDLE_SYNC_MS_MAX:.0f} ms")


def main():
    chosen = options(__doc__)
    shapes = chosen.shapes.split(",")
    checks = {}
    for shape in shapes:
        figures = {}
        checks[f"{shape}: decision part beside the floor"] = lambda s=shape, f=figures: beside_floor(report, s, f)
        checks[f"{shape}: decision part beside PyTorch"] = lambda f=figures: beside_peer(report, f)
    for rank in MEMORY_MAX:
        checks[f"{shapes[-1]}: device memory at rank {rank}"] = lambda r=rank: memory(report, shapes[-1], r)
    found = {}
    checks["the hash scan beside a copy"] = lambda: scan(report, found)
    checks["an idle sync of 16 GB"] = lambda: idle_sync(report, found)
    report = Report(chosen, checks)
    for name, function in checks.items():
        report.check(name, function)


if __name__ == "__main__":
    sys.exit(main())
