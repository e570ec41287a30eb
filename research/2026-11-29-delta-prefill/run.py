#!/usr/bin/env python3
"""A Gated DeltaNet layer's prefill, beside transformers' on the same CPU, in turn.

usage: run.py APOLLOD PYTHON [--contexts 1024,4096,8192] [--rounds 3]

PYTHON has torch and transformers (ci/setup_transformers.sh makes one). Layers are of Qwen3.5-0.8B's shape: hidden 1024, intermediate
3584, 16 key and value heads of 128. A layer's time is a quarter of what a model of five takes more than a model of one, so
that what the last layer leaves out does not count. transformers runs in f32 and in bf16, and the faster of the two is taken.
Writes results.json beside this file.
"""
import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
LAYERS = (1, 5)


def config(layers):
    return dict(architectures=["Qwen3_5ForCausalLM"], model_type="qwen3_5_text", hidden_size=1024, intermediate_size=3584,
                num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_num_key_heads=16,
                linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4,
                vocab_size=1024, tie_word_embeddings=True, max_position_embeddings=16384, layer_types=["linear_attention"] * layers)


def ours(apollod, layers, context, folder):
    """(ms of prefill, MB of private memory)"""
    path = folder / f"{layers}.json"
    path.write_text(json.dumps(config(layers)))
    done = subprocess.run([apollod, "bench", "step", "--shape", path, "--context", str(context), "--decision", "8", "--rank", "8",
                           "--dtype", "bf16", "--steps", "2", "--json"], check=True, capture_output=True, text=True)
    out = json.loads(done.stdout)
    return out["prefill_ms"], out["private_memory_mb"]


def theirs():
    """Reads lines of (layers, context, dtype), prints ms."""
    import torch
    from transformers import AutoConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer
    for line in sys.stdin:
        layers, context, dtype = line.split()
        shape = AutoConfig.for_model(**{k: v for k, v in config(int(layers)).items() if k != "architectures"})
        shape._attn_implementation = "eager"
        with torch.no_grad():
            stack = [Qwen3_5DecoderLayer(shape, i).to(getattr(torch, dtype)).eval() for i in range(int(layers))]
            x0 = torch.randn(1, int(context), 1024, dtype=getattr(torch, dtype))
            best = float("inf")
            for _ in range(2):
                began, x = time.monotonic(), x0
                for layer in stack:
                    x = layer(x, position_embeddings=None, attention_mask=None)
                    x = x[0] if isinstance(x, tuple) else x
                best = min(best, time.monotonic() - began)
        print(best * 1e3, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("apollod")
    parser.add_argument("python")
    parser.add_argument("--contexts", default="1024,4096,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return theirs()
    peer = subprocess.Popen([options.python, __file__, "-", "-", "--peer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(layers, context, dtype):
        print(layers, context, dtype, file=peer.stdin, flush=True)
        return float(peer.stdout.readline())

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for context in map(int, options.contexts.split(",")):
            rounds = {"apollod": [], "f32": [], "bf16": []}
            for _ in range(options.rounds):
                (few, _), (many, memory) = (ours(options.apollod, n, context, pathlib.Path(scratch)) for n in LAYERS)
                rounds["apollod"].append((many - few) / (LAYERS[1] - LAYERS[0]))
                for dtype, name in (("float32", "f32"), ("bfloat16", "bf16")):
                    few, many = (ask(n, context, dtype) for n in LAYERS)
                    rounds[name].append((many - few) / (LAYERS[1] - LAYERS[0]))
            row = dict(context=context, private_memory_mb=memory, ms={
                name: dict(median=statistics.median(values), least=min(values), most=max(values)) for name, values in rounds.items()})
            results.append(row)
            print(json.dumps(row), flush=True)
    peer.stdin.close()
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
