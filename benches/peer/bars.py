"""What low-rank linear is to reach beside PyTorch: from rounds of both programs to rows with "bar", "case", "value", "wanted", "met".

A value is the median over the rounds of a quotient of two times of one round; null, as is `met`, where one was not measured.
"""

import statistics

LARGE = "m4096 k4096 n4096"
CPU = "m1024 k4096 n4096"
EXPERTS = ["e64 top8 m4096 k4096 n6144 r16", "e64 top8 m4096 k3072 n4096 r16"]
# Each names two times as (side, bench/case, ways of which the fastest counts; none: the case's own).
ONE, SIXTEEN = ("ours", f"low_rank_linear/{LARGE} r16 b1"), ("ours", f"low_rank_linear/{LARGE} r16 b16")
PLAIN, PEER_PLAIN = ("ours", f"linear/{LARGE}"), ("peer", f"linear/{LARGE}")


def peer(time, *ways):
    return ("peer", time[1], *ways)


ON_CUDA = [
    # What is measured, the dividend, the divisor, at most or at least.
    ("time with one adapter / PyTorch's plain product (cuBLASLt)", ONE, PEER_PLAIN, "<=", 1.05),
    ("rate of the plain product / PyTorch's (cuBLASLt)", PEER_PLAIN, PLAIN, ">=", 0.95),
    ("PyTorch eager / one adapter", peer(ONE, "eager", "addmm"), ONE, ">=", 1.2),
    ("torch.compile / one adapter", peer(ONE, "compiled"), ONE, ">=", 1.2),
    ("PyTorch batched (baddbmm, einsum) / 16 adapters", peer(SIXTEEN, "eager", "einsum", "compiled"), SIXTEEN, ">=", 1.5),
]
for name in EXPERTS:
    layer = ("ours", f"low_rank_linear/{name}")
    ON_CUDA += [
        ("PyTorch, a loop over experts / experts", peer(layer, "loop"), layer, ">=", 3.0),
        ("PyTorch grouped or padded / experts", peer(layer, "grouped", "padded"), layer, ">", 1.0),
    ]
ON_CPU = [
    (
        "time with one adapter / without, on the CPU",
        ("ours", f"low_rank_linear/{CPU} r16 b1"),
        ("ours", f"linear/{CPU}"),
        "<=",
        1.1,
    ),
]


def milliseconds(said, side, case, *ways):
    """One time of a round; None where there is none."""
    program = said.get(side, {})
    if not ways:
        return program.get("ms", {}).get(case)
    known = program.get("details", {}).get(case, {}).get("ways", {})
    times = [known[way] for way in ways if way in known]
    return min(times) if times else None


def measured(rounds):
    """A row for every bar of the device that the rounds ran on."""
    device = next((r["ours"]["device"] for r in rounds if "device" in r.get("ours", {})), "cpu")
    rows = []
    for bar, dividend, divisor, sense, bound in ON_CPU if device == "cpu" else ON_CUDA:
        pairs = [(milliseconds(r, *dividend), milliseconds(r, *divisor)) for r in rounds]
        quotients = [a / b for a, b in pairs if a and b]
        case = next(time[1] for time in (divisor, dividend) if time[0] == "ours").split("/", 1)[1]
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


def tables(bars, merge_or_fuse):
    """Both in Markdown."""
    lines = []
    if bars:
        lines += ["", "| what low-rank linear is to reach | case | wanted | measured | lowest - highest | |", "|---|---|--:|--:|--:|---|"]
        for bar in bars:
            value, spread = "not measured", ""
            if bar["value"] is not None:
                value, spread = f"{bar['value']:.3f}", "{:.3f} - {:.3f}".format(*bar["spread"])
            met = {True: "met", False: "MISSED", None: ""}[bar["met"]]
            lines.append(f"| {bar['bar']} | {bar['case']} | {bar['wanted']} | {value} | {spread} | {met} |")
    if merge_or_fuse:
        head = ["merge or fuse", "rows", "rank", "merge ms", "fused ms", "plain ms", "merging wins from, calls", "`auto` merges from, calls"]
        lines += ["", "| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
        calls = lambda n: "never" if n is None else str(n)
        for m in merge_or_fuse:
            times = [f"{m[k]:.4g}" for k in ("merge_ms", "fused_ms", "plain_ms")]
            cells = [m["case"], str(m["rows"]), str(m["rank"]), *times, calls(m["calls"]), calls(m["policy_calls"])]
            lines.append("| " + " | ".join(cells) + " |")
    return lines
