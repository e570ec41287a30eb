#!/bin/sh
# Makes the model, results.json and stripping.svg again: 10 to 25 minutes for the model on one core, 9 for the rest. The model is left in MODEL.
# usage: run.sh MODEL
set -eu
model=${1:?usage: run.sh MODEL, a folder that is not there yet}
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
cargo build --release --locked --workspace --manifest-path "$root/Cargo.toml"
# As in research/demo_model/run.sh.
export RAYON_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
"$root/target/release/demo_model" instructed "$model"
"$root/target/release/demo_model" facts > "$model/facts.jsonl"
unset RAYON_NUM_THREADS
python3 "$here/run.py" --apollod "$root/target/release/apollod" --model "$model" --facts "$model/facts.jsonl" --out "$here"
