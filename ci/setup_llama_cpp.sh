#!/usr/bin/env bash
# Installs llama.cpp's server for the CPU: about ten seconds and 110 MB. Nothing is compiled: the package xllamacpp brings
# llama.cpp as a wheel for every x86-64 and Arm processor; ci/llama_server.py starts its server.
# usage: setup_llama_cpp.sh [VENV]     default: ${APOLLOD_CACHE:-$HOME/.cache/apollod}/llama_cpp
# Needs python3 (3.10 or newer, with venv). Prints the virtual environment's path on stdout.
# A second run with the same versions does nothing; an unfinished or outdated environment is made anew.
set -euo pipefail
venv=${1:-${APOLLOD_CACHE:-$HOME/.cache/apollod}/llama_cpp}
packages=(xllamacpp==2026.10.11549)

# The marker is written last and holds everything that the environment was made from.
wanted=${packages[*]}
marker=$venv/.apollod-complete
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
  echo "$venv"
  exit 0
fi

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ]; then
  echo "setup_llama_cpp.sh: python3 is missing; install python3 with venv" >&2
  exit 1
fi
if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
  echo "setup_llama_cpp.sh: $venv exists and is not a virtual environment; name another folder" >&2
  exit 1
fi

mkdir -p "$(dirname "$venv")"
"$python" -m venv --clear "$venv"
# A wheel or nothing: building llama.cpp takes many minutes.
"$venv/bin/pip" install -q --disable-pip-version-check --only-binary :all: "${packages[@]}" >&2
"$venv/bin/python" -c 'import xllamacpp; xllamacpp.CommonParams()' >&2
echo "$wanted" > "$marker"
echo "$venv"
