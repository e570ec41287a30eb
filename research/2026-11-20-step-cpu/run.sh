#!/usr/bin/env bash
# One context-frozen step on a Qwen3-0.6B shape, apollod and PyTorch in turn, three times each.
# usage: run.sh [PYTHON]   PYTHON: the peer's interpreter, from ../peer/setup.sh. Needs a quiet machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
python=${1:-$("$root/research/peer/setup.sh")}
cargo build --release --manifest-path "$root/Cargo.toml" >&2
for run in 1 2 3; do
  ours=$("$root/target/release/apollod" bench step --shape qwen3-0.6b --context 512 --decision 32 --rank 256 --dtype bf16 --steps 5 --json)
  peer=$("$python" "$root/research/peer/torch_apollo.py" --size 0.6b --dtype bf16 --opt apollo256 --modes frozen --k 5 2>/dev/null)
  printf '{"run": %s, "apollod": %s, "peer": %s}\n' "$run" "$ours" "$peer"
done
