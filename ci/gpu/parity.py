"""Gradients on the GPU beside those on the CPU, for each supported family, and the doctor's account of the kernels.

The models are the small ones of model/tests/goldens (two families each twice, odd sizes) and one of random weights whose
sizes are those of a real layer. Reference: `apollod grads --dtype f32` on the CPU, of the same weights.
f32: ||got - want|| / ||want|| of every tensor at most 1e-4. bf16: the weights are rounded to bf16, `--dtype native` on
the GPU, at most 1e-2: each product rounds its inputs to 8 bits.
"""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import load_file, save_file

from report import FAIL, PASS, ROOT, Broken, Failed, Report, options, output_of

TOLERANCE = {"f32": 1e-4, "bf16": 1e-2}
# A gradient smaller than this part of the model's is zero but for rounding: its error is measured against this part.
NEGLIGIBLE = {"f32": 1e-6, "bf16": 1e-4}
GOLDENS = ROOT / "model" / "tests" / "goldens"
LAYER = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=1024, num_hidden_layers=2,
             intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=4096,
             tie_word_embeddings=False, rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=4096,
             hidden_act="silu", attention_bias=False, torch_dtype="float32")


def random_layer_model(folder, seed):
    """A model directory with examples of several lengths of context and decision."""
    folder.mkdir()
    g = torch.Generator().manual_seed(seed)
    h, q, kv, ffn, v = 1024, 16 * 128, 8 * 128, 3072, 4096
    shapes = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "model.norm.weight": (h,)}
    for n in range(2):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
            "self_attn.q_norm": (128,), "self_attn.k_norm": (128,), "mlp.gate_proj": (ffn, h), "mlp.up_proj": (ffn, h),
            "mlp.down_proj": (h, ffn), "input_layernorm": (h,), "post_attention_layernorm": (h,)}.items()}
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=g)
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * (0.02 if "embed" in name else shape[1] ** -0.5)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LAYER))
    ids = lambda n: torch.randint(0, v, (n,), generator=g).tolist()
    lengths = ((300, 32), (129, 7), (1, 1), (64, 40))
    (folder / "examples.jsonl").write_text(
        "".join(json.dumps(dict(context_ids=ids(c), decision_ids=ids(d))) + "\n" for c, d in lengths))


def in_bf16(source, folder):
    """The same model with its weights rounded."""
    shutil.copytree(source, folder)
    save_file({n: t.bfloat16() for n, t in load_file(source / "model.safetensors").items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def grads(options, model, dtype, device, out):
    """({"i.name": gradient}, [losses])."""
    printed = output_of([options.apollod, "grads", "--model", model, "--examples", model / "examples.jsonl", "--out", out,
                         "--dtype", dtype, *device], 60)
    return load_file(out), [e["loss"] for e in json.loads(printed)["examples"]]


def compare(got, want, tolerance, negligible):
    """(error, name) of the worst tensor."""
    if got.keys() != want.keys():
        raise Failed(f"not the same tensors: {sorted(got.keys() ^ want.keys())}")
    whole = {}
    for name, t in want.items():
        example = name.split(".", 1)[0]
        whole[example] = whole.get(example, 0.0) + t.double().norm().item() ** 2
    worst = (0.0, "none")
    for name, t in want.items():
        least = negligible * whole[name.split(".", 1)[0]] ** 0.5
        error = ((got[name].double() - t.double()).norm() / max(t.double().norm().item(), least, 1e-300)).item()
        worst = max(worst, (error if error == error else float("inf"), name))
    return worst


def check(report, source, dtype):
    if report.options.device == "cpu":
        raise Broken("without a GPU both would be the CPU")
    scratch = report.options.work / f"{source.name}-{dtype}"
    scratch.mkdir()
    model = source
    if dtype == "bf16":
        in_bf16(source, model := scratch / "model")
    want, want_losses = grads(report.options, model, "f32", [], scratch / "cpu.safetensors")
    got, losses = grads(report.options, model, "f32" if dtype == "f32" else "native", report.options.on_device,
                        scratch / "gpu.safetensors")
    error, name = compare(got, want, TOLERANCE[dtype], NEGLIGIBLE[dtype])
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, want_losses, strict=True))
    report.keep(f"{source.name} {dtype}", dict(worst=error, tensor=name, loss=loss, tensors=len(want)))
    detail = f"worst of {len(want)} gradients {error:.1e} ({name}), losses within {loss:.1e}, tolerance {TOLERANCE[dtype]:.0e}"
    return (PASS if error <= TOLERANCE[dtype] and loss <= TOLERANCE[dtype] else FAIL), detail


def doctor(report):
    text = output_of([report.options.apollod, "doctor", "--model", ROOT / "research/demo_model/model",
                      *report.options.on_device], 60)
    print(text, flush=True)
    return PASS, text.splitlines()[-1]


def main():
    chosen = options(__doc__)
    sources = sorted(p.parent for p in GOLDENS.glob("*/examples.jsonl"))
    if chosen.device == "cuda":     # too large for a simulation
        sources.append(chosen.work / "qwen3_layers")
        random_layer_model(sources[-1], chosen.seed)
    checks = {f"gradients of {s.name} in {d}": (s, d) for d in TOLERANCE for s in sources}
    report = Report(chosen, ["doctor", *checks])
    report.check("doctor", lambda: doctor(report))
    for name, (source, dtype) in checks.items():
        report.check(name, lambda: check(report, source, dtype))


if __name__ == "__main__":
    sys.exit(main())
