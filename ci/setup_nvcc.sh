#!/usr/bin/env bash
# Installs NVIDIA's CUDA compiler, which makes the PTX in compute/kernels: about ten seconds and 280 MB. No GPU, driver or
# root is needed; nvcc wants a host compiler (g++) beside it.
# usage: setup_nvcc.sh [FOLDER]     default: ${APOLLOD_CACHE:-$HOME/.cache/apollod}/nvcc
# Needs python3 (3.10 or newer, with pip). Prints the toolkit's folder on stdout, the one to call CUDA_HOME; the compiler
# is bin/nvcc in it, and cuobjdump and nvdisasm, which show what it made, lie beside it.
# A second run with the same versions does nothing; an unfinished or outdated folder is made anew.
set -euo pipefail
folder=${1:-${APOLLOD_CACHE:-$HOME/.cache/apollod}/nvcc}
# 13.0 and no newer: the driver must know the PTX version that the compiler writes, and the drivers of CUDA 13.0 (580)
# are the oldest that are to work. The two that only show things have no 13.0 of their own and read its files.
packages=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51)

# The marker is written last and holds everything that the folder was made from.
wanted=${packages[*]}
home=$folder/nvidia/cu13
marker=$folder/.apollod-complete
if [ -f "$marker" ] && [ "$(cat "$marker")" = "$wanted" ]; then
  echo "$home"
  exit 0
fi

python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
for tool in "${python:-python3}" g++; do
  command -v "$tool" >/dev/null || { echo "setup_nvcc.sh: $tool is missing; install python3 with pip, and g++" >&2; exit 1; }
done
if [ -e "$folder" ] && [ -n "$(ls -A "$folder")" ] && [ ! -d "$home" ]; then
  echo "setup_nvcc.sh: $folder exists and holds something else; name another folder" >&2
  exit 1
fi

rm -rf "$folder"
mkdir -p "$folder"
"$python" -m pip install -q --disable-pip-version-check --root-user-action=ignore --no-deps --only-binary :all: \
  --target "$folder" "${packages[@]}" >&2
# nvcc looks for lib64, the wheels bring lib.
ln -s lib "$home/lib64"
"$home/bin/nvcc" --version >&2
echo "$wanted" > "$marker"
echo "$home"
