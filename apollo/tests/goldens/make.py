#!/usr/bin/env python3
"""Golden runs of the optimizer on one matrix: the weights after each step, from the apollo-torch package.

usage: make.py [--out DIR]        default: this folder. Deterministic; prints a table and fails if a case shows too little.

The committed files were made with apollo-torch 1.0.3, torch 2.15.0 and transformers 5.23.0 on the CPU in f32. Needs
those packages and bitsandbytes (apollo_torch imports it). The package is only called, as a library.

CASE.in.safetensors    w (m,n) the first weights · x.t (T,n) and dy.t (T,m) of step t, G = dy.tᵀ x.t · p.k (r, min(m,n))
                       the projection of the k-th refresh, in use from step k·update_proj_gap. All f32. Metadata, as
                       strings: rank, lr, scale, scale_type, update_proj_gap, beta1, beta2, eps, weight_decay,
                       norm_growth_limit ("1.01" or "off"), norm_growth_floor, convention.
CASE.out.safetensors   w.t (m,n), the weights after step t.

A replay is right if at every step ||w.t - mine|| is at most 1e-5 of the distance moved so far, ||w.t - w||. lr is large
so that the movement stands far above f32's rounding of the weights: the same run in f64 gives the noise of the files,
which is printed and must be a tenth of that.

What to know about the package when matching it:
- Two step counters. The projection looks at the number of steps done before this one (refreshed at 0, gap, 2·gap, …);
  bias correction counts from 1.
- Which side is projected depends on m >= n: a square matrix is treated as tall (rows keep their norms, columns are
  projected). For a tall matrix the stored projection is (r, n), for a wide one (m, r): p.k is its transpose there.
- The rank is used as given, also when it exceeds min(m, n). No case here does.
- Moments live in the projected space and are kept, not reset or rotated, across a refresh.
- The limiter compares the norm of this update with the previous one *after* limiting, plus 1e-8. The first step is never
  limited. An exact zero gradient stores a norm of zero, and the next update is then cut to about 1e-8 and grows from
  there by 1% a step; no case here has one, because a floor is the answer to that.
- The limiter's norm is taken before sqrt(scale) is multiplied in (unless scale_front is set), and before lr and bias
  correction.
- Weight decay comes last and multiplies the weights that the step has already moved by 1 - lr·weight_decay.
- `disable_nl` (the limiter off) is an argument of the optimizer, not of a parameter group.
- A `scale` in a group reaches the update as sqrt(scale); there is no sqrt(d/r) of the paper in it.
"""
import argparse
import copy
import dataclasses
import json
import os
import pathlib
import struct
import sys
import zlib

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import apollo_torch
import torch
from safetensors.torch import save

STEPS = 12
NOISE_TOLERANCE = 1e-6    # of the distance moved, f32 against f64


@dataclasses.dataclass(frozen=True)
class Case:
    m: int
    n: int
    rank: int = 6
    lr: float = 0.02
    scale: float = 1.0
    scale_type: str = "channel"
    update_proj_gap: int = 5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    norm_growth_limit: str = "1.01"


TALL, WIDE, SQUARE = dict(m=44, n=22), dict(m=21, n=47), dict(m=30, n=30)
CASES = {
    "tall_channel": Case(**TALL),
    "wide_channel": Case(**WIDE),
    "square_channel": Case(**SQUARE),
    "tall_channel_decay": Case(**TALL, weight_decay=0.1),
    "wide_channel_decay": Case(**WIDE, weight_decay=0.1, scale=4.0),
    "square_channel_unlimited": Case(**SQUARE, norm_growth_limit="off", beta1=0.8, beta2=0.95, eps=1e-3),
    "tall_tensor_mini": Case(**TALL, rank=1, scale_type="tensor", scale=128.0, lr=0.002),
    "wide_tensor_mini_decay": Case(**WIDE, rank=1, scale_type="tensor", scale=128.0, lr=0.002, weight_decay=0.1),
    "square_tensor": Case(**SQUARE, scale_type="tensor", update_proj_gap=1),
}


def make_input(case, seed):
    """First weights and the factors of each gradient. T differs from step to step, the gradient's size by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"w": 0.1 * torch.randn(case.m, case.n, generator=generator)}
    for t in range(STEPS):
        tokens = int(torch.randint(1, 8, (), generator=generator))
        size = 10 ** float(4 * torch.rand((), generator=generator) - 2)
        # A common part makes successive gradients point alike, as those of one task do.
        common = torch.linspace(-1, 1, case.n)
        tensors[f"x.{t}"] = torch.randn(tokens, case.n, generator=generator) + common
        tensors[f"dy.{t}"] = size * (torch.randn(tokens, case.m, generator=generator) + 0.5)
    return tensors


@dataclasses.dataclass
class Run:
    weights: list        # (m, n) after each step
    projections: list    # (r, min(m, n)) of each refresh
    limited: int         # steps that the limiter cut


def run(case, tensors, dtype):
    """The package's optimizer on this input, everything in `dtype`."""
    p = torch.nn.Parameter(tensors["w"].to(dtype, copy=True))
    group = dict(params=[p], rank=case.rank, proj="random", proj_type="std", scale=case.scale, scale_type=case.scale_type,
                 update_proj_gap=case.update_proj_gap)
    optimizer = apollo_torch.APOLLOAdamW(
        [group], lr=case.lr, betas=(case.beta1, case.beta2), eps=case.eps, weight_decay=case.weight_decay,
        disable_nl=case.norm_growth_limit == "off")
    result, state, before = Run([], [], 0), optimizer.state[p], None
    for t in range(STEPS):
        p.grad = tensors[f"dy.{t}"].to(dtype).T @ tensors[f"x.{t}"].to(dtype)
        optimizer.step()
        result.weights.append(p.detach().clone())
        if t % case.update_proj_gap == 0:
            projection = state["projector"].ortho_matrix
            result.projections.append((projection if case.m >= case.n else projection.T).clone())
        norm = state.get("scaled_grad")
        if before is not None and abs(norm / (1.01 * before) - 1) < 1e-5:
            result.limited += 1
        before = copy.deepcopy(norm)
    return result


def noise(result, exact, first):
    """The largest error of any step of `result` (f32) against `exact` (f64), relative to the distance moved so far."""
    return max(((a.double() - b).norm() / (b - first.double()).norm()).item() for a, b in zip(result.weights, exact.weights))


def write(path, tensors, metadata):
    """A safetensors file whose bytes are the same every time: the library writes metadata in no fixed order."""
    data = save({k: v.float().contiguous() for k, v in tensors.items()}, metadata=metadata)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length, f"{path.name}: the header grew when it was sorted"
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length:])
    return path.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder for the cases")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)    # the order of sums, and so the last bits, depend on the number of threads
    print(f"{'case':26}{'m':>4}{'n':>4}{'rank':>5}{'refreshes':>10}{'limited':>8}{'moved/|w|':>10}{'f32 noise':>10}{'bytes':>8}")
    total = 0
    for name, case in CASES.items():
        tensors = make_input(case, zlib.crc32(name.encode()))
        result, exact = run(case, tensors, torch.float32), run(case, tensors, torch.float64)
        error = noise(result, exact, tensors["w"])
        moved = ((result.weights[-1] - tensors["w"]).norm() / tensors["w"].norm()).item()
        assert error <= NOISE_TOLERANCE, f"{name}: f32 and f64 differ by {error:.1e} of the distance moved; raise lr"
        assert len(result.projections) == -(-STEPS // case.update_proj_gap) >= 2, f"{name}: too few refreshes"
        if case.norm_growth_limit != "off":
            assert 2 <= result.limited <= STEPS - 2, f"{name}: {result.limited} of {STEPS} steps limited; want some of both"
        metadata = {f.name: str(getattr(case, f.name)) for f in dataclasses.fields(case) if f.name not in "mn"}
        metadata |= dict(norm_growth_floor="0", convention="apollo-torch")
        projections = {f"p.{k}": p for k, p in enumerate(result.projections)}
        weights = {f"w.{t}": w for t, w in enumerate(result.weights)}
        size = write(out / f"{name}.in.safetensors", tensors | projections, metadata)
        size += write(out / f"{name}.out.safetensors", weights, {"made_with": f"apollo-torch 1.0.3, torch {torch.__version__}"})
        total += size
        print(f"{name:26}{case.m:4}{case.n:4}{case.rank:5}{len(projections):10}{result.limited:8}{moved:10.2f}{error:10.1e}{size:8}")
    print(f"{total} bytes in {out}")


if __name__ == "__main__":
    sys.exit(main())
