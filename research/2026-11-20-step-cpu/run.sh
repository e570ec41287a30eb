#!/usr/bin/env bash
# One context-frozen step on a Qwen3-0.6B shape, apollod and PyTorch in turn, three times each. Needs a quiet machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
cargo build --release --manifest-path "$root/Cargo.toml" >&2
"$root/research/peer/bench.py" --apollod "$root/target/release/apollod" --rounds 3 --steps 5 --out "$here"
