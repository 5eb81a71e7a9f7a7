"""What ops are to reach beside PyTorch: from rounds of both programs to rows with "bar", "case", "value", "wanted", "met".

A value is the median over the rounds of a quotient of two times of one round, or of a case's operations and its time (TFLOP/s);
null, as is `met`, where one was not measured.
"""

import statistics

LARGE = "m4096 k4096 n4096"
CPU = "m1024 k4096 n4096"
EXPERTS = ["e64 top8 m4096 k4096 n6144 r16", "e64 top8 m4096 k3072 n4096 r16"]
# Each names two times as (side, bench/case, ways of which the fastest counts; none: the case's own). Two are no sides: "flops" is
# what a case computes, in units that make a quotient with a time TFLOP/s, and "ceiling" the time in which PyTorch's large bf16
# product computes as much, as measured in the same round.
ONE, SIXTEEN = ("ours", f"low_rank_linear/{LARGE} r16 b1"), ("ours", f"low_rank_linear/{LARGE} r16 b16")
PLAIN, PEER_PLAIN = ("ours", f"linear/{LARGE}"), ("peer", f"linear/{LARGE}")


def peer(time, *ways):
    return ("peer", time[1], *ways)


LOW_RANK = [
    # What is measured, the dividend, the divisor, at most or at least.
    ("time with one adapter / PyTorch's plain product (cuBLASLt)", ONE, PEER_PLAIN, "<=", 1.05),
    ("rate of the plain product / PyTorch's (cuBLASLt)", PEER_PLAIN, PLAIN, ">=", 0.95),
    ("PyTorch eager / one adapter", peer(ONE, "eager", "addmm"), ONE, ">=", 1.2),
    ("torch.compile / one adapter", peer(ONE, "compiled"), ONE, ">=", 1.2),
    ("PyTorch batched (baddbmm, einsum) / 16 adapters", peer(SIXTEEN, "eager", "einsum", "compiled"), SIXTEEN, ">=", 1.5),
]
for name in EXPERTS:
    layer = ("ours", f"low_rank_linear/{name}")
    LOW_RANK += [
        ("PyTorch, a loop over experts / experts", peer(layer, "loop"), layer, ">=", 3.0),
        ("PyTorch grouped or padded / experts", peer(layer, "grouped", "padded"), layer, ">", 1.0),
    ]
LOW_RANK_CPU = [
    (
        "time with one adapter / without, on the CPU",
        ("ours", f"low_rank_linear/{CPU} r16 b1"),
        ("ours", f"linear/{CPU}"),
        "<=",
        1.1,
    ),
]



def attention():
    """Forward and backward at long sequences, odd lengths, the generator's layers, norm and rotation, masks."""
    bars, ours = [], lambda case: ("ours", f"attention/{case}")
    beside = lambda text, case, least: (f"PyTorch's best / {text}", peer(ours(case)), ours(case), ">=", least)
    long = ["s4096 h16 b4", "s8192 h16 b2", "s16384 h16 b1"]
    for d, least in ((128, 0.95), (64, 0.9)):
        bars += [beside("forward", f"fwd d{d} {s}", least) for s in long]
    bars += [("TFLOP/s, forward", ("flops", ours(c)[1]), ours(c), ">=", 500) for c in (f"fwd d128 {s}" for s in long)]
    # A last tile that is not full costs no more than a full one; 2 % is what two times of one kernel differ by.
    for s, full, b in ((4353, 4480, 3), (5516, 5632, 3), (77, 128, 212)):
        times = [ours(f"fwd d128 s{n} h16 b{b}") for n in (s, full)]
        bars.append((f"time / that of {full} tokens, whole tiles", *times, "<=", 1.02))
    bars.append(beside("along the layers, with the copies it needs", "fwd d128 s32 h32 b5516 layers", 2.0))
    dense, rotated = ours(f"fwd d128 {long[1]}"), f"fwd d128 {long[1]} norm rotary"
    bars.append(("time with norm and rotation / without", ours(rotated), dense, "<=", 1.05))
    bars.append(beside("with norm and rotation", rotated, 1.0))
    bars.append(("time with half of the tiles masked / dense", ours(f"fwd d128 {long[1]} spans"), dense, "<=", 0.6))
    return bars + [beside("backward", f"bwd d128 {s}", 0.85) for s in long]


SMALL = ("ours", "attention/fwd d64 s1024 h4 b1")
FULL, SIXTY_FOURTH = ("ours", "generator/full L4000"), ("ours", "generator/1-64 L1000")
GENERATOR = [
    ("time / that of as many FLOPs in PyTorch's large bf16 product", FULL, ("ceiling", FULL[1]), "<=", 1.3),
    ("PyTorch / the published size", peer(FULL), FULL, ">=", 1.5),
]
# By bench: on a device, on the CPU.
BARS = {
    "low_rank_linear": (LOW_RANK, LOW_RANK_CPU),
    "attention": (attention(), [("PyTorch / forward, on the CPU", peer(SMALL), SMALL, ">=", 1.0)]),
    "generator": (GENERATOR, [("PyTorch / a 64th, on the CPU", peer(SIXTY_FOURTH), SIXTY_FOURTH, ">=", 1.0)]),
}
# What is in TFLOP/s is of these cards.
CARDS = ("H100", "H200")


def amount(said, side, case, *ways):
    """One time of a round in milliseconds, or a case's operations; None where there is none."""
    if side in ("flops", "ceiling"):
        flops = said.get("ours", {}).get("details", {}).get(case, {}).get("flops")
        if side == "flops":
            return flops and flops / 1e9
        product = said.get("peer", {}).get("details", {}).get("ceiling/matmul")
        return flops and product and flops / product["flops"] * product["ms"]
    program = said.get(side, {})
    if not ways:
        return program.get("ms", {}).get(case)
    known = program.get("details", {}).get(case, {}).get("ways", {})
    times = [known[way] for way in ways if way in known]
    return min(times) if times else None


def measured(rounds, bench, card=""):
    """A row for every bar of a bench on the device that the rounds ran on."""
    device = next((r["ours"]["device"] for r in rounds if "device" in r.get("ours", {})), "cpu")
    rows = []
    for bar, dividend, divisor, sense, bound in BARS[bench][device == "cpu"]:
        if dividend[0] == "flops" and not any(name in card for name in CARDS):
            continue
        pairs = [(amount(r, *dividend), amount(r, *divisor)) for r in rounds]
        quotients = [a / b for a, b in pairs if a and b]
        # What has to be small is the dividend.
        case = (dividend if sense == "<=" else divisor)[1].split("/", 1)[1]
        row = {"bar": bar, "case": case, "value": None, "spread": None, "wanted": f"{sense} {bound}", "met": None}
        if quotients:
            value = statistics.median(quotients)
            met = {"<=": value <= bound, ">=": value >= bound, ">": value > bound}[sense]
            row |= {"value": round(value, 3), "spread": [round(min(quotients), 3), round(max(quotients), 3)], "met": met}
        rows.append(row)
    return rows


def merge_or_fuse(rounds):
    """As our program says, from the first round, which has all cases."""
    return next((r["ours"]["merge_or_fuse"] for r in rounds if r.get("ours", {}).get("merge_or_fuse")), [])


def cost_model(rounds):
    """What the generator's ladder costs: time and memory beside operations, and the rate beside that of the largest size measured."""
    rows = []
    for case in dict.fromkeys(c for r in rounds for c in r.get("ours", {}).get("ms", {}) if c.startswith("generator/")):
        row = {"case": case.split("/", 1)[1]}
        for side, prefix in (("ours", ""), ("peer", "peer_")):
            said = [r[side] for r in rounds if r.get(side, {}).get("ms", {}).get(case)]
            details = [s.get("details", {}).get(case, {}) for s in said]
            if side == "ours":
                row["flops"] = next((d["flops"] for d in details if d.get("flops")), None)
            if said and row["flops"]:
                ms = statistics.median(s["ms"][case] for s in said)
                row |= {f"{prefix}ms": round(ms, 3), f"{prefix}tflops": round(row["flops"] / ms / 1e9, 3)}
            memory = [d["device_memory"] for d in details if d.get("device_memory")]
            if memory:
                row[f"{prefix}memory_gb"] = round(max(memory) / 1e9, 2)
        rows.append(row)
    known = [row for row in rows if "tflops" in row]
    for prefix in ("", "peer_"):
        of = [row for row in known if f"{prefix}tflops" in row]
        most = max(of, key=lambda row: row["flops"], default=None)
        for row in of:
            row[f"{prefix}rate_of_largest"] = round(row[f"{prefix}tflops"] / most[f"{prefix}tflops"], 3)
    return known


def table(bench, bars):
    """What a bench is to reach, in Markdown."""
    what = bench.replace("_", " ").replace("low rank", "low-rank")
    lines = ["", f"| what {what} is to reach | case | wanted | measured | lowest - highest | |", "|---|---|--:|--:|--:|---|"]
    for bar in bars:
        value, spread = "not measured", ""
        if bar["value"] is not None:
            value, spread = f"{bar['value']:.3f}", "{:.3f} - {:.3f}".format(*bar["spread"])
        met = {True: "met", False: "MISSED", None: ""}[bar["met"]]
        lines.append(f"| {bar['bar']} | {bar['case']} | {bar['wanted']} | {value} | {spread} | {met} |")
    return lines if bars else []


def merge_table(merge_or_fuse):
    """Where merging wins, in Markdown."""
    if not merge_or_fuse:
        return []
    head = ["merge or fuse", "rows", "rank", "merge ms", "fused ms", "plain ms", "merging wins from, calls", "`auto` merges from, calls"]
    lines = ["", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    calls = lambda n: "never" if n is None else str(n)
    for m in merge_or_fuse:
        times = [f"{m[k]:.4g}" for k in ("merge_ms", "fused_ms", "plain_ms")]
        cells = [m["case"], str(m["rows"]), str(m["rank"]), *times, calls(m["calls"]), calls(m["policy_calls"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cost_table(costs):
    """The generator's ladder, in Markdown."""
    if not costs:
        return []
    head = ["the generator's cost", "PFLOP"]
    for side in ("hywu", "PyTorch"):
        head += [f"{side} ms", "TFLOP/s", "rate / the largest's", "GB"]
    lines = ["", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    for row in costs:
        cells = [row["case"], f"{row['flops'] / 1e15:.4g}"]
        for prefix in ("", "peer_"):
            keys = [f"{prefix}{key}" for key in ("ms", "tflops", "rate_of_largest", "memory_gb")]
            cells += [str(row.get(key, "")) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
