#!/usr/bin/env python3
"""A model that knows nothing, 20 times as large as the demo's, with its tokenizer: for loss.py.

usage: larger.py MODEL OUT [--hidden N] [--layers N] [--seed N]        (needs numpy)

Qwen3-shaped, bf16, normal with standard deviation 0.02, norms at 1: 29 million parameters by default.
"""
import argparse
import json
import pathlib
import shutil

import numpy


def tensors(config):
    """Name and shape of each tensor, in the files' order."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        each = {"input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries), "self_attn.q_norm": (head,),
                "self_attn.k_norm": (head,), "post_attention_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in each.items())
    yield "model.norm.weight", (hidden,)


def bf16(values):
    """Rounded to the nearest, ties to even; the upper half of each f32."""
    bits = values.astype(numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(numpy.uint16)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    for file in options.model.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != "model.safetensors.index.json":
            shutil.copy(file, options.out)
    config = json.loads((options.model / "config.json").read_text())
    config |= {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "num_hidden_layers": options.layers,
               "max_window_layers": options.layers, "num_attention_heads": 8, "num_key_value_heads": 4,
               "head_dim": options.hidden // 8}
    (options.out / "config.json").write_text(json.dumps(config, indent=2))
    draw, header, parts, at = numpy.random.default_rng(options.seed), {}, [], 0
    for name, shape in tensors(config):
        values = numpy.ones(shape) if len(shape) == 1 else draw.normal(0, 0.02, shape)
        parts.append(bf16(values).tobytes())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (options.out / "model.safetensors").write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *parts]))
    print(f"{options.out}: {at / 2e6:.1f} million parameters")


if __name__ == "__main__":
    main()
