"""Runs both sides of the CPU comparison in turn; writes one JSON file a bench and machine.json, prints a Markdown table.

    python3 -m venv .venv && .venv/bin/pip install torch numpy
    cargo build --release -p hywu-benches
    .venv/bin/python benches/peer/compare_cpu.py benches/runs/2026-01-31-my-machine

Each round runs PyTorch, then this project, each in a process of its own with the same number of threads; what is written
is the median over the rounds and the ratio's spread (lowest - highest round). A ratio below 1 means that we are faster.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def machine(threads, torch):
    """What the numbers depend on, beside the code."""
    cpu = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.system()} {platform.release()}",
        "rustc": subprocess.check_output(["rustc", "--version"], cwd=ROOT, text=True).strip(),
        "torch": torch,
        "python": platform.python_version(),
    }


def measure(rounds, threads):
    """(PyTorch's version, PyTorch's and our milliseconds a round)."""
    ours, theirs, version = [], [], ""
    for i in range(rounds):
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
        peer = json.loads(subprocess.check_output([sys.executable, ROOT / "benches/peer/torch_peer.py", str(threads)]))
        mine = json.loads(subprocess.check_output([ROOT / "target/release/cpu_cases", str(threads)]))
        # Times of two different models compare nothing.
        if peer["parameters"] != mine["parameters"]:
            sys.exit(
                f"the backbone has {mine['parameters']} parameters here and {peer['parameters']} in torch_peer.py:"
                " build cpu_cases anew, or bring `Mini` in torch_peer.py up to hywu-diffusion's config.rs and backbone.rs"
            )
        theirs.append(peer["ms"])
        ours.append(mine["ms"])
        version = peer["torch"]
    return version, theirs, ours


def main():
    out = pathlib.Path(sys.argv[1])
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    threads = len(os.sched_getaffinity(0))
    version, theirs, ours = measure(rounds, threads)
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
    (out / "machine.json").write_text(json.dumps(machine(threads, version) | {"rounds": rounds}, indent=1) + "\n")
    print(f"| bench | case | hywu ms | torch {version} ms | ratio | lowest - highest |\n|---|---|--:|--:|--:|--:|")
    for name, rows in benches.items():
        (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        for row in rows:
            peer = ["", "", ""]
            if "peer" in row:
                low, high = row["spread"]
                peer = [f"{row['peer_ms']:.3f}", f"{row['ratio']:.2f}", f"{low:.2f} - {high:.2f}"]
            print("|", " | ".join([name, row["case"], f"{row['ours_ms']:.3f}", *peer]), "|")


if __name__ == "__main__":
    main()
