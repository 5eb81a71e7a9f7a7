"""Times `hywu edit` as a user sees it: wall time, sampling time and peak memory of whole processes.

    cargo build --release -p hywu-cli
    python3 benches/edit_time.py benches/runs/2026-01-31-my-machine

Writes edit.json: medians over the rounds for squares of 64 to 2048 pixels (the largest is 4 megapixels), smooth shapes with
noise. `startup_s` is everything but sampling in the 64-pixel edit: process start, model, text, condition, generator, files.
"""

import json
import os
import pathlib
import random
import statistics
import struct
import sys
import tempfile
import time
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDES = [64, 512, 1024, 2048]


def picture(path, side):
    """A PNG without a library: gradients and a little noise."""
    rng = random.Random(side)
    rows = bytearray()
    for y in range(side):
        rows.append(0)
        for x in range(side):
            n = rng.randrange(24)
            rows += bytes(((x * 200 // side) + n, (y * 200 // side) + n, ((x + y) * 100 // side) + n))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(rows), 1)) + chunk(b"IEND", b""))


def edit(source, target):
    """(wall seconds, what --json says, peak bytes) of one process."""
    read, write = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        program = ROOT / "target/release/hywu"
        os.execv(program, [str(program), "edit", str(source), "make it warmer", "-o", str(target), "--json"])
    os.close(write)
    with os.fdopen(read) as out:
        said = json.loads(out.read())
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        sys.exit(f"hywu ended with {status}")
    return time.perf_counter() - start, said, usage.ru_maxrss * 1024


def main():
    out = pathlib.Path(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for side in SIDES:
            source = folder / f"{side}.png"
            picture(source, side)
            runs = [edit(source, folder / "out.png") for _ in range(rounds)]
            wall = [r[0] for r in runs]
            sampling = [r[1]["sampling_s"] for r in runs]
            row = {
                "side": side,
                "steps": runs[0][1]["steps"],
                "wall_s": round(statistics.median(wall), 3),
                "wall_spread_s": [round(min(wall), 3), round(max(wall), 3)],
                "sampling_s": round(statistics.median(sampling), 3),
                "seconds_per_megapixel": round(statistics.median(sampling) / (side * side / 1e6), 3),
                "peak_mib": round(statistics.median(r[2] for r in runs) / 2**20, 1),
            }
            if side == SIDES[0]:
                row["startup_s"] = round(statistics.median(w - s for w, s in zip(wall, sampling)), 3)
            rows.append(row)
            print(row)
    out.mkdir(parents=True, exist_ok=True)
    (out / "edit.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
