#!/usr/bin/env bash
# Builds the fuzz targets and runs each with libFuzzer: fuzz/run.sh [TARGET ...] [-OPTION=VALUE ...], for example
#   fuzz/run.sh                        all of them, 7 seconds each from a fixed seed, as in CI
#   fuzz/run.sh adapter -runs=1000000  one of them; options are libFuzzer's (-help=1)
# Needs a C++ compiler beside Rust (stable). What was found interesting is kept in target/fuzz/corpus and taken up again; an input that
# breaks a target is left in target/fuzz/TARGET-crash-* and fails the run.
set -euo pipefail
cd "$(dirname "$0")/.."

targets=() options=()
for argument in "$@"; do
  case $argument in
    -*) options+=("$argument") ;;
    *) targets+=("$argument") ;;
  esac
done
[ ${#targets[@]} -gt 0 ] || targets=(index adapter formats config)
[ ${#options[@]} -gt 0 ] || options=(-seed=1 -max_total_time=7)

# The crates of the program itself, in its versions.
[ fuzz/Cargo.lock -nt Cargo.lock ] || cp Cargo.lock fuzz/Cargo.lock

# LLVM's coverage pass, as cargo-fuzz asks for it; the address sanitizer that it adds needs nightly, and this is safe Rust. With
# --target the flags stay away from build scripts.
host=$(rustc -vV | sed -n 's/^host: //p')
coverage=(trace-compares inline-8bit-counters pc-table)
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=$(printf ' -Cllvm-args=-sanitizer-coverage-%s' "${coverage[@]}")
RUSTFLAGS="$flags" cargo build --manifest-path fuzz/Cargo.toml --target-dir target/fuzz --target "$host" --release

for target in "${targets[@]}"; do
  corpus=target/fuzz/corpus/$target
  mkdir -p "$corpus"
  program=target/fuzz/$host/release/$target longest=2048
  if [ -d fuzz/seeds/"$target" ]; then cp fuzz/seeds/"$target"/* "$corpus"; fi
  case $target in
    config)
      for file in hywu-generator/tests/golden/*/config.json; do
        cp "$file" "$corpus/$(basename "$(dirname "$file")")"
      done ;;
    formats) # What the writers of these formats write.
      HYWU_FUZZ_SEEDS=$corpus "$program"
      longest=4096 ;;
  esac
  echo "== fuzz $target"
  "$program" "$corpus" -artifact_prefix="target/fuzz/$target-" -dict=fuzz/json.dict \
    -max_len=$longest -timeout=10 -rss_limit_mb=2048 "${options[@]}"
done
