#!/usr/bin/env bash
# Builds the emulator with the test's kernels and tests it; then the same with the address sanitizer.
#   run.sh [OUT_DIR]
# NVCC, if set, has to take the kernels too.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-$(mktemp -d)}
CXX=${CXX:-g++}

"$here/../build.sh" "$out/plain" "$here"/*.cu
"$here/../build.sh" "$out/asan" --asan "$here"/*.cu
"$CXX" -std=c++17 -O1 -g -pthread -Wall -Wextra -Wno-psabi "$here/main.cpp" "$here/hopper.cpp" -ldl -o "$out/main"
"$out/main" "$out/plain/libcuda.so.1" --all
LD_PRELOAD=$("$CXX" -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
    "$out/main" "$out/asan/libcuda.so.1" --asan
if [ -n "${NVCC:-}" ]; then
    for kernels in kernels hopper; do
        "$NVCC" -std=c++17 -gencode=arch=compute_90a,code=sm_90a -cubin -Werror all-warnings -I "$here/../../common" \
            "$here/$kernels.cu" -o "$out/$kernels.cubin"
    done
    echo "nvcc takes the kernels"
fi
