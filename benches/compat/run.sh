#!/usr/bin/env bash
# Loads this project's adapters in PEFT and diffusers, and theirs here. Makes a virtual environment (about 6 GB, PyTorch is most of it)
# in .venv-compat, or takes the one in HYWU_COMPAT_VENV as it is; the program is target/release/hywu, or HYWU.
set -euo pipefail
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
export HYWU="${HYWU:-$root/target/release/hywu}"
[[ -x $HYWU ]] || (cd "$root" && cargo build --release --locked -p hywu-cli)

venv="${HYWU_COMPAT_VENV:-}"
if [[ -z $venv ]]; then
  venv="$root/.venv-compat"
  [[ -x $venv/bin/python ]] || python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --requirement requirements.txt
fi
"$venv/bin/pip" list 2>/dev/null | grep -E '^(torch|peft|diffusers|safetensors|transformers) '
failed=0
for check in check_peft check_diffusers; do
  echo "== $check"
  "$venv/bin/python" "$check.py" || failed=1
done
exit $failed
