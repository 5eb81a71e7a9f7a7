#!/usr/bin/env bash
# Tests, sanitizer and comparison on a machine that has a GPU but neither cargo nor network.
#
#   benches/gpu.sh package OUT_DIR        where cargo and nvcc are: writes OUT_DIR/hywu-gpu.tar.xz and a copy of this script
#   gpu.sh run PACKAGE OUT_DIR [OPTIONS]  where the GPU is (python3, and best with torch, compute-sanitizer, nvidia-smi):
#                                         leaves OUT_DIR/runs/DATE-GPU/ with logs and results, and prints a table last
#     --rounds N      of the comparison (3)          --seconds N     for everything (480)
#     --parts LIST    of tests,sanitizer,compare,edit (all)   --quick   small shapes, untimed in effect
#     --only LIST     cases of the comparison that start so   --all     low-rank linear and attention at all shapes (more --seconds)
#
# Ends with 1 when a test, the smoke run, the sanitizer or a case of ours failed (a case also fails when its result is wrong). Reads the card's settings and never changes them.
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }

package() {
  local root out
  root=$(cd "$(dirname "$0")/.." && pwd)
  mkdir -p "$1"
  out=$(cd "$1" && pwd)
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  cd "$root"
  export HYWU_REQUIRE_NVCC=1
  cargo build --release --locked --features cuda -p hywu-benches --bin cases -p hywu-cli --bin hywu
  mkdir -p "$work/tests" "$work/target/release" "$work/benches/peer"
  cp -r hywu-generator/tests/golden "$work/"
  cp "${CARGO_TARGET_DIR:-target}"/release/{cases,hywu} "$work/target/release/"
  cp benches/peer/*.py "$work/benches/peer/"
  # Tests that look for files or for the program beside the sources can't run elsewhere, but those that HYWU_GOLDEN shows the way.
  cargo test --release --locked --features cuda --no-run --message-format=json \
    -p hywu-kernels -p hywu-diffusion -p hywu-generator -p hywu-cli | python3 -c '
import json, pathlib, shutil, sys
for line in sys.stdin:
    message = json.loads(line) if line.startswith("{") else {}
    if not message.get("executable") or not message["profile"]["test"]:
        continue
    source = pathlib.Path(message["target"]["src_path"])
    crate = pathlib.Path(message["manifest_path"]).parent.name
    text = source.read_text()
    starts = crate == "hywu-cli" and message["target"]["kind"] == ["test"]
    if starts or any(word in text for word in ("CARGO_MANIFEST_DIR", "cargo_bin")) and "HYWU_GOLDEN" not in text:
        print(f"left out, needs files or the program: {crate}/{source.stem}")
    elif message["target"]["kind"] != ["bin"]:
        name = message["target"]["name"]
        shutil.copy(message["executable"], f"{sys.argv[1]}/{crate}-{name}")
' "$work/tests"
  strip "$work"/tests/* "$work"/target/release/*
  { git rev-parse HEAD; rustc --version; "${HYWU_NVCC:-nvcc}" --version | grep release; } >"$work/build.txt"
  # By size: what holds the same kernels and the same model lies side by side, where the compressor still sees it.
  (cd "$work" && find . -type f -printf '%s %p\n' | sort -n | cut -d' ' -f2-) | tar -C "$work" --no-recursion -cf - -T - |
    xz -T1 --lzma2=preset=1,dict=128MiB >"$out/hywu-gpu.tar.xz"
  cp benches/gpu.sh "$out/"
  local size
  size=$(stat -c %s "$out/hywu-gpu.tar.xz")
  echo "$out/hywu-gpu.tar.xz: $((size / 1000000)) MB, $(ls "$work/tests" | wc -l) test programs"
  [ "$size" -lt 60000000 ] || { echo "more than 60 MB" >&2; exit 1; }
}

# A line of the table, kept for the end.
row() { printf '%-12s %-34s %s\n' "$1" "$2" "$3" | tee -a "$run/checks.txt"; }
left() { echo $((deadline - SECONDS)); }
wants() { case ",$parts," in *",$1,"*) ;; *) return 1 ;; esac; }

# One test program: its line of the table goes to standard output, 1 when it failed.
run_test() {
  local name code=0
  name=$(basename "$1")
  (cd "$work" && HYWU_REQUIRE_CUDA=1 HYWU_GOLDEN="$work/golden" RUST_BACKTRACE=0 timeout -k 5 90 "$1") >"$run/test-$name.log" 2>&1 || code=$?
  if [ "$code" = 0 ]; then
    row test "$name" "$(grep -h '^test result' "$run/test-$name.log" | tail -n 1 | cut -d';' -f1)"
  else
    row test "$name" "FAILED ($code): $(grep -c '^test .* FAILED' "$run/test-$name.log" || true) tests"
    grep -h '^test .* FAILED' "$run/test-$name.log" || true
    return 1
  fi
}

# Half as many at a time as there are processors: the oracles use several. The largest first, as they take longest.
run_tests() {
  local program jobs=$(($(nproc) / 2 + 1)) running=0
  for program in $(ls -S "$work"/tests/*); do
    if [ "$running" -ge "$jobs" ]; then wait -n || failed=1; running=$((running - 1)); fi
    run_test "$program" &
    running=$((running + 1))
  done
  while [ "$running" -gt 0 ]; do wait -n || failed=1; running=$((running - 1)); done
}

# Options that this version of compute-sanitizer knows.
known() {
  local option
  for option in "$@"; do
    if grep -q -- "${option%%=*}" <<<"$help"; then echo "$option"; fi
  done
}

run_sanitizer() {
  local tool code limit
  code=0
  (cd "$work" && timeout -k 5 60 "$cases" --device cuda --smoke) >"$run/smoke.log" 2>&1 || code=$?
  row smoke "every op, both dtypes" "$(tail -n 1 "$run/smoke.log")"
  [ "$code" = 0 ] || failed=1
  code=0
  (cd "$work" && timeout -k 5 60 "$cases" --device cuda --check --quick --only low_rank_linear,attention,generator) >"$run/check.log" 2>&1 || code=$?
  row check "results, hard operands too" "$(grep -c '^right' "$run/check.log" || true) right, $(grep -c '^WRONG' "$run/check.log" || true) wrong"
  [ "$code" = 0 ] || failed=1
  if ! command -v compute-sanitizer >/dev/null; then row sanitizer all "not run: there is no compute-sanitizer"; return; fi
  help=$(compute-sanitizer --help 2>&1 || true)
  # The comparison keeps its part of the time.
  limit=$(($(left) - seconds * 55 / 100))
  limit=$((limit < 90 ? limit : 90))
  if [ "$limit" -lt 10 ]; then row sanitizer all "not run: the time is up"; return; fi
  for tool in memcheck racecheck synccheck initcheck; do sanitize "$tool" "$limit" & done
  for tool in 1 2 3 4; do wait -n || failed=1; done
}

# One tool over the smoke run, for so many seconds at most; 1 when it found something.
sanitize() {
  local tool=$1 limit=$2 log=$run/sanitizer-$1.log code=0 more=()
  case $tool in
  # The program checks what the driver returns itself, and asks events that have not passed, which is no error.
  memcheck) mapfile -t more < <(known --report-api-errors=no --check-bulk-copy=yes --check-warpgroup-mma=yes) ;;
  racecheck) mapfile -t more < <(known --racecheck-memcpy-async=yes) ;;
  esac
  # 99 tells the sanitizer's errors from the smoke run's own.
  timeout -k 5 "$limit" compute-sanitizer --tool "$tool" --print-level=warn --print-limit=100 --error-exitcode=99 "${more[@]}" \
    "$cases" --device cuda --smoke >"$log" 2>&1 || code=$?
  if grep -qi 'device not supported' "$log"; then row sanitizer "$tool" "not run: it refuses this device"; return 0; fi
  case $code in
  0) row sanitizer "$tool" "no errors"; return 0 ;;
  124 | 137)
    row sanitizer "$tool" "stopped after $limit s: $(grep -c '^========= .*\(Error\|Invalid\|Race\|Uninit\)' "$log" || true) errors so far"
    ! grep -q '^========= .*\(Error\|Invalid\|Race\|Uninit\)' "$log"
    return
    ;;
  99) row sanitizer "$tool" "FAILED: $(grep 'ERROR SUMMARY' "$log" | tail -n 1 | sed 's/=* *//')" ;;
  *) row sanitizer "$tool" "FAILED: ended with $code, $(tail -n 1 "$log")" ;;
  esac
  return 1
}

run_all() {
  local package=$1 out=$2 gpu
  shift 2
  rounds=3 seconds=480 parts=tests,sanitizer,compare,edit more=()
  while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=$2; shift 2 ;;
    --seconds) seconds=$2; shift 2 ;;
    --parts) parts=$2; shift 2 ;;
    --quick | --all) more+=("$1"); shift ;;
    --only) more+=(--only "$2"); shift 2 ;;
    *) usage ;;
    esac
  done
  deadline=$((SECONDS + seconds))
  failed=0
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  tar -xJf "$package" -C "$work" 2>/dev/null ||
    python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$package" "$work"
  cases=$work/target/release/cases
  gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
  gpu=$(tr 'A-Z' 'a-z' <<<"${gpu:-gpu}" | sed 's/[^a-z0-9]\{1,\}/-/g')
  mkdir -p "$out"
  run=$(cd "$out" && pwd)/runs/$(date +%F)-$gpu
  rm -rf "$run"
  mkdir -p "$run"
  { cat "$work/build.txt"; uname -sr; nvidia-smi || echo "there is no nvidia-smi"; nproc; } 2>&1 | tee "$run/facts.txt"

  if wants tests; then run_tests; fi
  if wants sanitizer; then run_sanitizer; fi
  if wants compare; then
    # 45 s are kept for the edits.
    python3 "$work/benches/peer/compare_gpu.py" "$run" --cases "$cases" --rounds "$rounds" "${more[@]}" \
      --seconds $(($(left) - 45)) >"$run/compare.log" 2>&1 || { row compare "some cases" "FAILED: see compare.log"; failed=1; }
  fi
  if wants edit; then
    if timeout -k 5 60 "$cases" --device cuda --edit >"$run/edit.json" 2>"$run/edit.log"; then
      python3 -c '
import json, sys
for e in json.load(open(sys.argv[1]))["edits"]:
    print(e["case"] + ":", " ".join("%.3f" % s for s in e["seconds"]), "s")' "$run/edit.json" | while IFS= read -r line; do
        row edit "${line%%:*}" "${line#*: }"
      done
    else
      row edit "bundled model" "FAILED: $(tail -n 1 "$run/edit.log")"
      failed=1
    fi
  fi
  tar -C "$run/.." -czf "$run/../../results.tar.gz" "$(basename "$run")"
  echo
  cat "$run/summary.md" "$run/checks.txt" 2>/dev/null || true
  exit "$failed"
}

case "${1:-}" in
package) [ $# = 2 ] || usage; package "$2" ;;
run) [ $# -ge 3 ] || usage; shift; run_all "$@" ;;
*) usage ;;
esac
