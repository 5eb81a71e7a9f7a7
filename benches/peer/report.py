"""What compare_cpu.py and compare_gpu.py share: running both programs, and writing what came out.

A folder of results holds raw.csv (every round, every case), summary.md (the table), machine.md and machine.json, and one
BENCH.json a bench: a list of {"case", "ours_ms", "peer", "peer_ms", "ratio", "tflops", "gbs", "of_ceiling", "spread"}. A ratio
below 1 means that this project is faster; `spread` is its lowest and highest round. `of_ceiling` is the part of the ceiling
(measured bandwidth, or measured bf16 matrix product, whichever binds the case) that this project reaches. attention.json,
generator.json and low_rank_linear.json have that list as "cases", beside "bars" (bars.py), low_rank_linear.json "merge_or_fuse" too,
and generator.json "cost_model".
"""

import csv
import datetime
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

import bars

ROOT = pathlib.Path(__file__).resolve().parents[2]


def output(*command):
    """What a program prints; empty where there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def gpu_facts():
    """Name, driver and limits of the card, and its clocks at this moment."""
    fields = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw"
    line = output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()
    if not line:
        return {}
    facts = dict(zip((f.replace(".", "_") for f in fields.split(",")), (v.strip() for v in line[0].split(","))))
    version = re.search(r"CUDA Version: *([\d.]+)", output("nvidia-smi"))
    return facts | {"cuda": version.group(1) if version else ""}


def machine(**more):
    """What the numbers depend on, beside the code."""
    with open("/proc/cpuinfo") as lines:
        cpu = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        system = "Linux"
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{system}, {platform.system()} {platform.release()}",
        "rustc": output("rustc", "--version"),
        "nvcc": " ".join(re.findall(r"release .*", output(os.environ.get("HYWU_NVCC", "nvcc"), "--version"))),
        "python": platform.python_version(),
    }
    # In a package from gpu.sh: the commit and the compilers that it was built with.
    built = ROOT / "build.txt"
    if built.exists():
        facts["built_from"] = ", ".join(built.read_text().split("\n")).strip(", ")
        facts.pop("nvcc")
    return {k: v for k, v in (facts | more).items() if v not in ("", {}, None)}


def parsed(text):
    """The JSON of a program; of one that was cut off, the cases that were complete."""
    for end in ("", "}}"):
        try:
            return json.loads(text.rstrip().rstrip(",") + end)
        except ValueError:
            continue
    return {}


def run(command, seconds):
    """(JSON of a program, what went wrong) of one process."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, errors = process.communicate(timeout=seconds)
        trouble = "" if process.returncode == 0 else f"ended with {process.returncode}: {errors.strip()[-800:]}"
    except subprocess.TimeoutExpired:
        # The peer says then what it has; whoever does not end is ended.
        process.terminate()
        try:
            out, errors = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        trouble = f"stopped after {seconds:.0f} s: {errors.strip()[-400:]}"
    return parsed(out), trouble


class Comparison:
    """Rounds of both programs, in turn."""

    def __init__(self, ours, peer, peer_name):
        self.commands = {"ours": ours, "peer": peer}
        self.peer_name = peer_name
        self.rounds = []
        self.failures = {}

    def measure(self, rounds, seconds):
        """As many rounds as asked for, unless the next would not end within `seconds`."""
        start, longest = time.monotonic(), 0.0
        for i in range(rounds):
            left = seconds - (time.monotonic() - start)
            if i and longest > left:
                print(f"{i} of {rounds} rounds: the time is up", file=sys.stderr)
                break
            print(f"round {i + 1} of {rounds}", file=sys.stderr)
            began, result = time.monotonic(), {}
            for side in ("peer", "ours"):
                # In the first round each side may take as long as leaves the other its half.
                share = (seconds - (time.monotonic() - start)) * (0.6 if side == "peer" else 1.0)
                # The cases that are one of many are in the first round only.
                command = [*self.commands[side], *(["--few"] if i else [])]
                result[side], trouble = run(command, max(share, 10.0))
                failures = result[side].get("failures", {})
                for case, error in failures.items():
                    self.failures[f"{side}, {case}"] = error
                for case, detail in result[side].get("details", {}).items():
                    for way, error in detail.get("errors", {}).items():
                        self.failures[f"{side}, {case}, {way}"] = error
                # A program that says what failed ends with an error too.
                if trouble and not failures:
                    self.failures[f"{side}, round {i + 1}"] = trouble
            self.drop_unlike(result)
            self.rounds.append(result)
            longest = max(longest, time.monotonic() - began)
        # Times of two different models compare nothing.
        counts = {r[side].get("parameters") for r in self.rounds for side in r} - {None}
        if len(counts) > 1:
            sys.exit(
                f"the backbones have {sorted(counts)} parameters: build `cases` anew, or bring `Mini` in torch_mini.py up to"
                " hywu-diffusion's config.rs and backbone.rs"
            )

    def drop_unlike(self, result):
        """Takes those cases out of a round whose two sides say different numbers of operations: that is not the same model."""
        details = [result[side].get("details", {}) for side in ("ours", "peer")]
        for case in details[0].keys() & details[1].keys():
            ours, peer = (d[case].get("flops") for d in details)
            if ours and peer and abs(ours - peer) > 1e-6 * ours:
                self.failures[f"ours, {case}"] = f"{ours:.6e} operations, {peer:.6e} the peer's: two sizes"
                for said in result.values():
                    said["ms"].pop(case, None)

    def named(self):
        """The peer with its version."""
        version = next((r["peer"]["torch"] for r in self.rounds if "torch" in r["peer"]), "")
        return f"{self.peer_name} {version}".strip()

    def times(self, side, case):
        """Milliseconds of a case by round; None where a round has none."""
        return [r[side].get("ms", {}).get(case) for r in self.rounds]

    def names(self):
        """Cases in the order of our program, then what the peer alone has."""
        names = {}
        for side in ("ours", "peer"):
            for r in self.rounds:
                names.update(dict.fromkeys(r[side].get("ms", {})))
        return list(names)

    def detail(self, side, case):
        """What a program says about a case beside its time, of the last round that has it."""
        found = [r[side]["details"][case] for r in self.rounds if case in r[side].get("details", {})]
        return found[-1] if found else {}

    def ceilings(self):
        """Measured bytes and operations a second of the card; none for a CPU."""

        def rate(case, what):
            known = [ms for ms in self.times("peer", case) if ms]
            amount = self.detail("peer", case).get(what)
            return amount / (statistics.median(known) * 1e-3) if known and amount else None

        return rate("ceiling/copy", "bytes"), rate("ceiling/matmul", "flops")

    def row(self, case):
        """One case of our program."""
        ours, peer = self.times("ours", case), self.times("peer", case)
        ms = statistics.median(x for x in ours if x)
        row = {"case": case.split("/", 1)[1], "ours_ms": round(ms, 5)}
        ratios = [x / y for x, y in zip(ours, peer) if x and y]
        if ratios:
            row |= {"peer": self.named(), "peer_ms": round(statistics.median(y for y in peer if y), 5)}
            row |= {"ratio": round(statistics.median(ratios), 3), "spread": [round(min(ratios), 3), round(max(ratios), 3)]}
            row |= {k: v for k, v in self.detail("peer", case).items() if k in ("way", "ways")}
        floor = self.detail("ours", case)
        rates = {"bytes": floor.get("bytes", 0) / (ms * 1e-3), "flops": floor.get("flops", 0) / (ms * 1e-3)}
        if rates["flops"]:
            row["tflops"] = round(rates["flops"] / 1e12, 3)
        if rates["bytes"]:
            row["gbs"] = round(rates["bytes"] / 1e9, 1)
        parts = [rate / ceiling for rate, ceiling in zip(rates.values(), self.ceilings()) if rate and ceiling]
        if parts:
            row["of_ceiling"] = round(max(parts), 3)
        return row

    def write(self, out, facts):
        """All files of a folder of results; prints the table."""
        out.mkdir(parents=True, exist_ok=True)
        benches = {}
        for case in self.names():
            if any(self.times("ours", case)):
                benches.setdefault(case.split("/", 1)[0], []).append(self.row(case))
        card = facts.get("gpu_before", {}).get("name", "")
        reached = {name: {"bars": bars.measured(self.rounds, name, card)} for name in bars.BARS if name in benches}
        if "low_rank_linear" in reached:
            reached["low_rank_linear"]["merge_or_fuse"] = bars.merge_or_fuse(self.rounds)
        if "generator" in reached:
            reached["generator"]["cost_model"] = bars.cost_model(self.rounds)
        for name, rows in benches.items():
            if name in reached:
                rows = {"cases": rows} | reached[name]
            (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        with open(out / "raw.csv", "w", newline="") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["round", "side", "case", "ms", "p10", "p90", "samples", "calls"])
            for i, r in enumerate(self.rounds):
                for side, said in r.items():
                    for case, ms in said.get("ms", {}).items():
                        detail = said.get("details", {}).get(case, {})
                        lines.writerow([i + 1, side, case, ms, *(detail.get(k, "") for k in ("p10", "p90", "samples", "calls"))])
        facts = facts | {"rounds": len(self.rounds)}
        bandwidth, arithmetic = self.ceilings()
        if bandwidth:
            facts["measured_copy_gbs"] = round(bandwidth / 1e9)
        if arithmetic:
            facts["measured_matmul_tflops"] = round(arithmetic / 1e12, 1)
        write_machine(out, facts)
        text = self.table(benches)
        for name, more in reached.items():
            lines = bars.table(name, more["bars"]) + bars.merge_table(more.get("merge_or_fuse"))
            lines += bars.cost_table(more.get("cost_model"))
            text += "\n".join(lines) + "\n"
        (out / "summary.md").write_text(text)
        print(text)

    def table(self, benches):
        """The summary in Markdown."""
        gpu = any(self.ceilings())
        head = ["bench", "case", "hywu ms", f"{self.named()} ms", "ratio", "lowest - highest"]
        head += ["TFLOP/s", "GB/s", "of ceiling"] if gpu else []
        lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
        for name, rows in benches.items():
            for row in rows:
                cells = [name, row["case"], f"{row['ours_ms']:.4g}", "", "", ""]
                if "peer" in row:
                    low, high = row["spread"]
                    cells[3:] = [f"{row['peer_ms']:.4g}", f"{row['ratio']:.2f}", f"{low:.2f} - {high:.2f}"]
                if gpu:
                    part = f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else ""
                    cells += [f"{row['tflops']:.1f}" if "tflops" in row else "", str(row.get("gbs", "")), part]
                lines.append("| " + " | ".join(cells) + " |")
        if self.failures:
            lines += ["", "Failed:", ""]
            lines += [f"- {what}: {' '.join(error.split())[:300]}" for what, error in self.failures.items()]
        return "\n".join(lines) + "\n"


def write_machine(out, facts):
    """machine.json, and the same for reading."""
    (out / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = ["| what | value |", "|---|---|"]
    for what, value in facts.items():
        pairs = [(f"{what}: {k}", v) for k, v in value.items()] if isinstance(value, dict) else [(what, value)]
        lines += [f"| {k} | {v} |" for k, v in pairs]
    (out / "machine.md").write_text("\n".join(lines) + "\n")


def folder(given, kind):
    """The folder to write to: as given, or runs/DATE-KIND beside the benches."""
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return pathlib.Path(given) if given else ROOT / "benches/runs" / f"{datetime.date.today()}-{slug}"
