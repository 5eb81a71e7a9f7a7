#!/usr/bin/env bash
# Runs the commands of docs/gallery.md, in its order, and puts their pictures beside this file, at most 900 pixels wide:
#     docs/gallery/make.sh
# Needs python3 with pillow and numpy, and the program: HYWU, or target/release/hywu.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
program=${HYWU:-$root/target/release/hywu}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

hywu() { "$program" "$@" --quiet; }
cd "$work"
ln -s "$root/assets" "$root/docs" .
# Commands are the lines of the page that begin as one.
while read -r line; do
  eval "$line"
done < <(grep -E '^(hywu|python3) ' docs/gallery.md)

python3 - "$here" *.jpg <<'END'
import sys
from pathlib import Path
from PIL import Image
for name in sys.argv[2:]:
    picture = Image.open(name)
    picture.thumbnail((900, 900), Image.LANCZOS)
    picture.save(Path(sys.argv[1]) / name, quality=85)
END
