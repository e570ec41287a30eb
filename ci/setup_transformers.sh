#!/usr/bin/env bash
# Installs `transformers serve`, an OpenAI-compatible server, for the CPU: about one minute and 1.3 GB.
# usage: setup_transformers.sh [VENV]     default: ${APOLLOD_CACHE:-$HOME/.cache/apollod}/transformers
# Needs python3 (3.10 or newer, with venv), gcc and binutils. Prints the virtual environment's path on stdout.
# A second run with the same versions does nothing; an unfinished or outdated environment is made anew.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:-${APOLLOD_CACHE:-$HOME/.cache/apollod}/transformers}
packages=(torch==2.13.0 'transformers[serving]==5.23.0' accelerate==1.15.0)

# The marker is written last and holds everything that the environment was made from.
wanted=$(cat "$here/transformers_overrides.txt" "$here/cuda_stubs.py" <(printf '%s\n' "${packages[@]}") | sha256sum | cut -d' ' -f1)
marker=$venv/.apollod-complete
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
  echo "$venv"
  exit 0
fi

python=${PYTHON:-$(command -v python3.11 || command -v python3)}
for tool in "$python" gcc nm readelf; do
  command -v "$tool" >/dev/null || { echo "setup_transformers.sh: $tool is missing; install python3, gcc and binutils" >&2; exit 1; }
done
if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
  echo "setup_transformers.sh: $venv exists and is not a virtual environment; name another folder" >&2
  exit 1
fi

mkdir -p "$(dirname "$venv")"
"$python" -m venv --clear "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check uv >&2
"$venv/bin/uv" pip install -q --python "$venv/bin/python" --override "$here/transformers_overrides.txt" "${packages[@]}" >&2
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$venv/bin/python" "$here/cuda_stubs.py" "$site/torch/lib" >&2
"$venv/bin/python" -c 'import torch, transformers; assert not torch.cuda.is_available()'
"$venv/bin/transformers" version >&2
echo "$wanted" > "$marker"
echo "$venv"
