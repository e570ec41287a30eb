#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under eight minutes: results.json and the logs of each part.
# usage: gpu.sh [--build FOLDER] [--out DIR] [--only PART,…] [--kills N] [--device cuda|simulated|cpu] …   (--help says all)
# FOLDER is what `just gpu-build` has made elsewhere; a copy of this script lies in it, and takes that folder.
# Needs an NVIDIA GPU with its driver, and python3 (PYTHON names another) with torch, transformers, safetensors and numpy.
# No Rust, no network. Exit status: 0 all passed, 1 something failed or missed its target, 2 something could not run.
set -euo pipefail
exec "${PYTHON:-python3}" "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/gpu/run.py" "$@"
