#!/usr/bin/env python3
"""A small Qwen3.5 model of random weights, with another model's tokenizer: for `run.py vllm`.

usage: make_hybrid.py MODEL_DIR OUT      needs torch and transformers (ci/setup_transformers.sh)

Three recurrent layers and one with attention; fewer key heads than value heads.
"""
import json
import pathlib
import shutil
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def main():
    source, out = map(pathlib.Path, sys.argv[1:])
    of = json.loads((source / "config.json").read_text())
    config = AutoConfig.for_model(
        "qwen3_5_text", vocab_size=of["vocab_size"], eos_token_id=of["eos_token_id"], bos_token_id=None, hidden_size=128,
        intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64, tie_word_embeddings=False,
        max_position_embeddings=1024, rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, out / name)


if __name__ == "__main__":
    main()
