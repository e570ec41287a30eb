#!/bin/sh
# Makes model/, results.json and loss.svg again, from nothing: about 8 to 12 minutes on one core.
# One thread, because the matrices are too small to share; the malloc settings keep large
# temporaries from going back to the kernel after every operation (a quarter of the time otherwise).
set -eu
cd "$(dirname "$0")"
cargo build --release -p demo_model
export RAYON_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
run() { cargo run --quiet --release -p demo_model -- "$@"; }
run train
run teach | tee teach.txt
# Optional: PYTHON=/path/to/python with torch and transformers.
if [ -n "${PYTHON:-}" ]; then "$PYTHON" check_transformers.py .; fi
