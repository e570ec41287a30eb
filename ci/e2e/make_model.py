#!/usr/bin/env python3
"""A small model of random weights with another model's tokenizer, for `run.py`.

usage: make_model.py MODEL_DIR OUT [hybrid|stacks|both]      needs torch and transformers (ci/setup_transformers.sh)

hybrid: Qwen3.5, three recurrent layers and one with attention; fewer key heads than value heads. stacks: Qwen3-MoE, two of eight
experts for each token, stacked in the file as transformers holds them. both: Qwen3.5-MoE, each expert by itself in the file.
"""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, bos_token_id=None,
              tie_word_embeddings=False, max_position_embeddings=1024)
EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
RECURRENT = dict(num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
                 rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))
KINDS = {
    "hybrid": ("qwen3_5_text", RECURRENT | dict(intermediate_size=256)),
    "stacks": ("qwen3_moe", EXPERTS | dict(num_hidden_layers=3, intermediate_size=256, norm_topk_prob=True)),
    "both": ("qwen3_5_moe_text", RECURRENT | EXPERTS | dict(shared_expert_intermediate_size=128)),
}


def main():
    source, out = map(pathlib.Path, sys.argv[1:3])
    kind = sys.argv[3] if len(sys.argv) > 3 else "hybrid"
    model_type, sizes = KINDS[kind]
    of = json.loads((source / "config.json").read_text())
    config = AutoConfig.for_model(model_type, vocab_size=of["vocab_size"], eos_token_id=of["eos_token_id"], **COMMON, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    if kind == "stacks":
        save_file(dict(model.named_parameters()), out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, out / name)


if __name__ == "__main__":
    main()
