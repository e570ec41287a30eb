#!/usr/bin/env python3
"""Makes a Qwen3-shaped model of 117 M parameters with random weights, for measuring speed.

usage: random_model.py FOLDER TOKENIZER_DIR     needs torch and transformers
"""
import pathlib
import shutil
import sys

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

folder, tokenizer = map(pathlib.Path, sys.argv[1:])
torch.manual_seed(1)
config = Qwen3Config(vocab_size=32_000, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
                     num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True)
model = Qwen3ForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(folder)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(tokenizer / name, folder)
print(sum(p.numel() for p in model.parameters()), file=sys.stderr)
