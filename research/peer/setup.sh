#!/usr/bin/env bash
# Makes a Python environment for torch_apollo.py on a machine without CUDA: about a minute and 1.8 GB.
# usage: setup.sh [DIR]   default: ~/.cache/apollod/peer. Prints the interpreter's path.
# PyPI's torch wants CUDA libraries at import; stubs with the right sonames stand in for them (CPU use only).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:-${APOLLOD_CACHE:-$HOME/.cache/apollod}/peer}
if ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import torch, transformers, apollo_torch' 2>/dev/null; }; then
  python3 -m venv "$venv"
  pip() { "$venv/bin/pip" install -q --disable-pip-version-check "$@"; }
  pip --no-deps torch==2.15.0
  pip filelock typing_extensions sympy networkx jinja2 fsspec numpy setuptools
  pip --no-deps nvidia-cuda-runtime==13.2.86 nvidia-cuda-cupti==13.2.86
  python3 "$here/../../ci/cuda_stubs.py" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch/lib" >&2
  pip transformers==5.23.0 safetensors zstandard accelerate
  pip --no-deps apollo-torch==1.0.3 bitsandbytes
fi
echo "$venv/bin/python"
