"""Compares this project with PyTorch on a CUDA device, in bf16; see report.py for what it writes.

    HYWU_NVCC=.. cargo build --release -p hywu-benches --features cuda
    python3 benches/peer/compare_gpu.py [benches/runs/2026-01-31-my-card] [--rounds 3] [--seconds 300]

Each round runs PyTorch, then this project, each in a process of its own. Without PyTorch this project is timed alone.
"""

import argparse
import sys

from report import ROOT, Comparison, folder, gpu_facts, machine


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", help="where to write; benches/runs/DATE-GPU unless given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="no round begins that would end later")
    parser.add_argument("--cases", default=ROOT / "target/release/cases", help="this project's program")
    parser.add_argument("--only", default="", help="cases whose names start so, or so: words with commas between")
    parser.add_argument("--all", action="store_true", help="low-rank linear and attention at all shapes")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs, not how fast")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch without torch.compile")
    args = parser.parse_args()
    options = ["--device", "cuda", "--only", args.only, *(["--quick"] if args.quick else [])]
    options += ["--all"] if args.all else []
    peer = [sys.executable, ROOT / "benches/peer/torch_peer.py", *options]
    peer += ["--no-compile"] if args.no_compile else []
    comparison = Comparison([args.cases, *options], peer, "torch")
    before = gpu_facts()
    comparison.measure(args.rounds, args.seconds)
    facts = machine(gpu_before=before, gpu_after=gpu_facts(), peer=comparison.named())
    comparison.write(folder(args.out, before.get("name", "gpu")), facts)
    # A peer that is missing is listed, but is no failure of ours; nor is what there was no time for.
    failures = comparison.failures.items()
    if any(what.startswith("ours") and not why.startswith("stopped after") for what, why in failures):
        sys.exit(1)


if __name__ == "__main__":
    main()
