#!/usr/bin/env bash
# Installs the pinned CUDA compiler (13.0, with the tools that list machine code) from Python wheels, and says where it is:
#
#     eval "$(scripts/install_nvcc.sh [DIR])"      # sets HYWU_NVCC; DIR is .cuda-venv in this folder unless given
#
# Needs python3 with venv, 300 MB of disk and, the first time, network. To compile, nvcc also needs g++. The wheels are
# NVIDIA's and not free software: nothing of them belongs into the repository.
set -euo pipefail
exec 3>&1 1>&2 # Standard output is for eval alone.

root=$(cd "$(dirname "$0")/.." && pwd)
requirements=$root/scripts/cuda-requirements.txt
venv=${1:-$root/.cuda-venv}

fail() { echo "install_nvcc.sh: $*"; exit 1; }

# The pattern finds nvcc whatever Python's version is. readlink: nvcc looks for its parts beside its own path.
find_nvcc() {
  local path
  for path in "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc; do
    if [ -x "$path" ]; then readlink -f "$path"; return; fi
  done
  return 1
}

# The copy of the list is written last: it says that all of it, in these versions, was installed.
if ! cmp -s "$requirements" "$venv/installed.txt" || ! nvcc=$(find_nvcc) || ! "$nvcc" --version >/dev/null 2>&1; then
  command -v python3 >/dev/null || fail "python3 not found"
  # --clear takes all of a folder away, so only from one that was a venv before.
  [ ! -e "$venv" ] || [ -e "$venv/pyvenv.cfg" ] || fail "$venv exists and is no Python venv"
  python3 -m venv --clear "$venv" || fail "python3 cannot make a venv in $venv (on Debian: apt-get install python3-venv)"
  # --no-deps: the compiler's own dependencies are not pinned, and newer ones don't fit it.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile --only-binary=:all: \
    --require-hashes -r "$requirements" || fail "pip could not install the wheels; its reason is above"
  nvcc=$(find_nvcc) || fail "the wheels hold no nvcc"
  "$nvcc" --version >/dev/null || fail "$nvcc does not run"
  cp "$requirements" "$venv/installed.txt"
fi
printf 'export HYWU_NVCC=%q\n' "$nvcc" >&3
