"""Compares this project with PyTorch on the CPU; see report.py for what it writes.

    python3 -m venv .venv && .venv/bin/pip install torch numpy
    cargo build --release -p hywu-benches
    .venv/bin/python benches/peer/compare_cpu.py [benches/runs/2026-01-31-my-machine] [--rounds 5]

Each round runs PyTorch, then this project, each in a process of its own with the same number of threads.
"""

import argparse
import os
import sys

from report import ROOT, Comparison, folder, machine


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", help="where to write; benches/runs/DATE-CPU unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600, help="no round begins that would end later")
    parser.add_argument("--only", default="", help="cases whose names start so, or so: words with commas between")
    args = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    options = ["--device", "cpu", "--threads", threads, "--only", args.only]
    ours = [ROOT / "target/release/cases", *options]
    comparison = Comparison(ours, [sys.executable, ROOT / "benches/peer/torch_peer.py", *options], "torch")
    comparison.measure(args.rounds, args.seconds)
    facts = machine(threads=threads, peer=comparison.named())
    comparison.write(folder(args.out, facts["cpu"]), facts)
    if comparison.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
