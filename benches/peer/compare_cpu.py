"""Runs both sides of the CPU comparison in turn and writes one JSON file a bench.

    python3 -m venv .venv && .venv/bin/pip install torch numpy
    cargo build --release -p hywu-benches
    .venv/bin/python benches/peer/compare_cpu.py benches/runs/2026-01-31-my-machine

Each round runs PyTorch, then this project, each in a process of its own with the same number of threads; what is written
is the median over the rounds and the ratio's spread (lowest - highest round). A ratio below 1 means that we are faster.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def main():
    out = pathlib.Path(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    threads = str(len(os.sched_getaffinity(0)))
    ours, theirs, version = [], [], ""
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
        peer = json.loads(subprocess.check_output([sys.executable, ROOT / "benches/peer/torch_peer.py", threads]))
        mine = json.loads(subprocess.check_output([ROOT / "target/release/cpu_cases", threads]))
        theirs.append(peer["ms"])
        ours.append(mine["ms"])
        version = peer["torch"]
    benches = {}
    for key in ours[0]:
        a = [r[key] for r in ours]
        row = {"case": key.split("/", 1)[1], "ours_ms": round(statistics.median(a), 4)}
        if key in theirs[0]:
            b = [r[key] for r in theirs]
            ratios = [x / y for x, y in zip(a, b)]
            row |= {"peer": f"torch {version}", "peer_ms": round(statistics.median(b), 4)}
            row |= {"ratio": round(statistics.median(ratios), 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)]}
        benches.setdefault(key.split("/", 1)[0], []).append(row)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in benches.items():
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(f"\n{name}")
        for row in rows:
            peer = f"{row['peer_ms']:10.3f} {row['ratio']:7.2f} {row['spread']}" if "peer" in row else ""
            print(f"  {row['case']:36} {row['ours_ms']:10.3f} {peer}")


if __name__ == "__main__":
    main()
