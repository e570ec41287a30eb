#!/usr/bin/env bash
# usage: run.sh APOLLOD OUT
set -euo pipefail
exec "$(dirname "$0")/../peer/bench.py" --apollod "$1" --out "$2" --rounds 5 --steps 3
