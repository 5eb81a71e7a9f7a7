#!/usr/bin/env bash
# Compiles every CUDA kernel for sm_80 and sm_90a and looks at the machine code; needs no GPU:
#
#     scripts/check_kernels.sh [FOLDER]      # kernels-cu unless given
#
# Prints registers, shared memory and the instructions that matter. Fails on a warning, a spill, any local memory, and on
# wgmma that the assembler had to serialise. There is no list of exemptions: such a kernel is slow and is to be changed.
# The compiler is HYWU_NVCC, or else the pinned one of install_nvcc.sh.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

if [ -z "${HYWU_NVCC:-}" ]; then
  line=$("$here/install_nvcc.sh") # Not inside eval, which would hide that it failed.
  eval "$line"
fi
command -v python3 >/dev/null || { echo "check_kernels.sh: python3 not found" >&2; exit 1; }
exec python3 "$here/check_kernels.py" "$HYWU_NVCC" "${1:-$here/../kernels-cu}"
