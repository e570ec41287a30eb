#!/usr/bin/env bash
# Cost of a step by tokens of decision and of context. usage: run.sh APOLLOD OUT.jsonl; about five minutes on two cores
set -euo pipefail
step() { "$1" bench step --shape qwen3-0.6b --context "$2" --decision "$3" --rank 256 --dtype bf16 --steps 2 --json; }
{
  for decision in 8 16 32 64 128 256; do step "$1" 64 "$decision"; done
  for context in 512 1024 2048 4096 8192; do step "$1" "$context" 32; done
} > "$2"
