"""Linear layers with low-rank updates in PyTorch: the cases of benches/src/cases/low_rank, under the same names.

A case is written in every way that a user of PyTorch would reasonably choose, and the fastest counts: adapters of a batch by
baddbmm, by einsum or as one wide product whose S is masked; ragged instances in a loop, padded or masked; experts in a loop, by
grouped_mm or padded. torch.compile, which takes seconds for every shape, is tried where a bar depends on it; everywhere with --all.
"""

import torch
import torch.nn.functional as F
from torch_timing import ARGS, CUDA, DEVICE, fastest, randn, ways

SCALE, RAGGED, MASK64 = 0.5, 16, 2**64 - 1
TOKENS = [256, 1024, 4096, 16384, 5516 * 32]
SIDES = [(192, 576), (1024, 4096), (4096, 4096), (4096, 6144), (3072, 4096), (4096, 16384)]
RANKS, ROWS, VARIED = [4, 16, 64], [1, 4, 16, 64, "ragged"], 4096
CPU = [
    (1024, 4096, 4096, 16, 1),
    (2688, 192, 576, 8, 32),
    (2688, 192, 1024, 8, 32),
    (2688, 512, 192, 8, 32),
    (2688, 192, 576, 8, "ragged"),
    (64, 768, 256, 8, 1),
    (64, 4096, 4096, 16, 1),
]
QUICK = [(64, 24, 48, 4, 1), (64, 24, 48, 16, 1), (64, 24, 48, 4, 4), (64, 24, 48, 4, "ragged")]
# Cases that are one of many: timed for a shorter time, and in the first round only.
WIDE = set()


def shapes():
    """Rows in all, inner, outer, rank, instances."""
    if ARGS.quick or not CUDA:
        return QUICK if ARGS.quick else CPU
    usual = lambda r, rows: (r == 16) + (rows == 1)
    every = [(m, k, n, r, rows) for m in TOKENS for k, n in SIDES for rows in ROWS for r in RANKS]
    wanted = lambda m, k, n, r, rows: ARGS.all or usual(r, rows) == 2 or m == VARIED and usual(r, rows) == 1
    return [shape for shape in every if wanted(*shape)]


def of_a_bar(m, k, n, r, rows):
    return m != 256 and m <= 4096 and (k, n) == (4096, 4096) and r in (0, 16) and rows in (1, 16)


def lengths(m, rows):
    """Rows of the instances; ragged ones are 1 : 20 at the extremes."""
    if rows != "ragged":
        return [m // rows] * rows
    weights = [15 + 19 * ((7 * i + 3) % RAGGED) for i in range(RAGGED)]
    ends = [m * sum(weights[: i + 1]) // sum(weights) for i in range(RAGGED)]
    return [end - start for start, end in zip([0, *ends], ends)]


def words():
    """Random words of a fixed seed (splitmix64)."""
    state = 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        yield z ^ (z >> 31)


def routing(experts, top, tokens):
    """Rows of every expert: each token draws `top` different ones."""
    counts, draw = [0] * experts, words()
    for _ in range(tokens):
        drawn = []
        while len(drawn) < top:
            expert = next(draw) % experts
            if expert not in drawn:
                drawn.append(expert)
        for expert in drawn:
            counts[expert] += 1
    return counts


def ends_of(counts):
    ends = torch.tensor(counts).cumsum(0).tolist()
    return list(zip([0, *ends], ends))


def owners(counts):
    """The instance or expert of every row, and the row's place in a padded [instances, longest]."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    starts = torch.tensor([start for start, _ in ends_of(counts)])
    slot = owner * max(counts) + torch.arange(len(owner)) - starts[owner]
    return owner.to(DEVICE), slot.to(DEVICE)


def padded(x, slot, instances, longest):
    return x.new_zeros(instances * longest, x.shape[-1]).index_copy_(0, slot, x).view(instances, longest, -1)


def linear(m, k, n):
    short = CUDA and not of_a_bar(m, k, n, 0, 1)
    return fastest(lambda: (randn(m, k), randn(n, k, scale=k**-0.5)), ways(F.linear), short=short)


def single(x, w, a, b):
    """As it is written down."""
    return x @ w.T + SCALE * (x @ a.T) @ b.T


def single_addmm(x, w, a, b):
    return torch.addmm(F.linear(x, w), x @ a.T, b.T, alpha=SCALE)


def batched(x, w, a, b):
    y = F.linear(x, w)
    return torch.baddbmm(y, torch.bmm(x, a.mT), b.mT, alpha=SCALE)


def batched_einsum(x, w, a, b):
    return F.linear(x, w) + SCALE * torch.einsum("bmr,bnr->bmn", torch.einsum("bmk,brk->bmr", x, a), b)


def masked(owner, instances):
    """All adapters side by side; S keeps a row's own."""

    def call(x, w, a, b):
        rows, r = x.reshape(-1, x.shape[-1]), a.shape[1]
        s = (rows @ a.reshape(instances * r, -1).T).view(-1, instances, r)
        own = torch.nn.functional.one_hot(owner, instances).to(s.dtype)
        s = (s * own[:, :, None]).view(-1, instances * r)
        wide_b = b.transpose(0, 1).reshape(-1, instances * r)
        return torch.addmm(F.linear(rows, w), s, wide_b.T, alpha=SCALE).view(*x.shape[:-1], -1)

    return call


def update(m, k, n, r, rows):
    counts = lengths(m, rows)
    instances, short = len(counts), CUDA and not of_a_bar(m, k, n, r, rows)
    compiled = CUDA and (not short or ARGS.all)
    weight = lambda: randn(n, k, scale=k**-0.5)
    adapters = lambda: (randn(instances, r, k, scale=k**-0.5), randn(instances, n, r, scale=0.1))
    if rows == 1:
        make = lambda: (randn(m, k), weight(), *(t[0] for t in adapters()))
        return fastest(make, ways(single, compiled) | {"addmm": single_addmm}, short=short)
    owner, slot = owners(counts)
    if rows != "ragged":
        make = lambda: (randn(rows, m // rows, k), weight(), *adapters())
        calls = ways(batched, compiled) | {"einsum": batched_einsum, "masked": masked(owner, instances)}
        return fastest(make, calls, short=short)

    def loop(x, w, a, b):
        y = F.linear(x, w)
        for i, (start, end) in enumerate(ends_of(counts)):
            y[start:end].addmm_(x[start:end] @ a[i].T, b[i].T, alpha=SCALE)
        return y

    def pad(x, w, a, b):
        s = torch.bmm(padded(x, slot, instances, max(counts)), a.mT)
        low = torch.bmm(s, b.mT).view(-1, b.shape[1])
        return torch.add(F.linear(x, w), low.index_select(0, slot), alpha=SCALE)

    calls = {"loop": loop, "padded": pad, "masked": masked(owner, instances)}
    return fastest(lambda: (randn(m, k), weight(), *adapters()), calls, short=short)


def gradients(m, k, n, r, rows):
    """Those of x, A and B, the weight being frozen."""
    forward = single_addmm if rows == 1 else batched

    def call(x, w, a, b, grad):
        y = forward(x, w, a, b)
        return y.detach(), *torch.autograd.grad(y, (x, a, b), grad)

    entries = () if rows == 1 else (rows,)
    make = lambda: (
        randn(*entries, m // rows, k).requires_grad_(),
        randn(n, k, scale=k**-0.5),
        randn(*entries, r, k, scale=k**-0.5).requires_grad_(),
        randn(*entries, n, r, scale=0.1).requires_grad_(),
        randn(*entries, m // rows, n),
    )
    # What is compiled is the forward pass, and with it its gradients.
    calls = {"eager": call}
    if CUDA and not ARGS.no_compile and not ARGS.quick:
        compiled = torch.compile(forward, dynamic=False)

        def call_compiled(x, w, a, b, grad):
            y = compiled(x, w, a, b)
            return y.detach(), *torch.autograd.grad(y, (x, a, b), grad)

        calls["compiled"] = call_compiled
    return fastest(make, calls, grad=True)


def experts(count, top, tokens, k, n, r, parts):
    """Rows sorted by expert; the columns are `parts` equal parts with ranks of their own."""
    counts = routing(count, top, tokens)
    rows, each = sum(counts), n // parts
    ends, (_, slot) = ends_of(counts), owners(counts)
    offsets = torch.tensor([end for _, end in ends], dtype=torch.int32, device=DEVICE)

    def make():
        b = randn(count, n, r, scale=0.1)
        # B as one matrix for all parts, zero where a part's ranks are another's.
        wide = torch.zeros(count, n, parts * r, dtype=b.dtype, device=DEVICE)
        for p in range(parts):
            wide[:, p * each : (p + 1) * each, p * r : (p + 1) * r] = b[:, p * each : (p + 1) * each]
        return randn(rows, k), randn(count, n, k, scale=k**-0.5), randn(count, parts * r, k, scale=k**-0.5), b, wide

    def loop(x, w, a, b, wide):
        y = x.new_empty(rows, n)
        for e, (start, end) in enumerate(ends):
            own = x[start:end]
            base, s = own @ w[e].T, own @ a[e].T
            for p in range(parts):
                columns = slice(p * each, (p + 1) * each)
                y[start:end, columns] = torch.addmm(base[:, columns], s[:, p * r : (p + 1) * r], b[e, columns].T, alpha=SCALE)
        return y

    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)

    def grouped(x, w, a, b, wide):
        s = grouped_mm(x, a.mT, offs=offsets)
        return grouped_mm(x, w.mT, offs=offsets).add_(grouped_mm(s, wide.mT, offs=offsets), alpha=SCALE)

    def pad(x, w, a, b, wide):
        x = padded(x, slot, count, max(counts))
        y = torch.baddbmm(torch.bmm(x, w.mT), torch.bmm(x, a.mT), wide.mT, alpha=SCALE)
        return y.view(-1, n).index_select(0, slot)

    return fastest(make, {"loop": loop, **({"grouped": grouped} if grouped_mm else {}), "padded": pad})


def merge(k, n, r):
    make = lambda: (randn(n, k, scale=k**-0.5), randn(r, k, scale=k**-0.5), randn(n, r, scale=0.1))
    call = lambda w, a, b: torch.addmm(w, b, a, alpha=SCALE)
    return fastest(make, ways(call, compiled=not ARGS.quick and r == 16), short=CUDA and not of_a_bar(1, k, n, r, 1))


def shrink(m, k, r):
    make = lambda: (randn(m, k), randn(r, k, scale=k**-0.5))
    return fastest(make, ways(lambda x, a: SCALE * (x @ a.T), compiled=not ARGS.quick))


def cases():
    """{name: function that times it}."""
    out = {}
    pick = lambda quick, cpu, cuda: quick if ARGS.quick else cuda if CUDA else cpu

    def add(name, wide, run, *shape):
        if name not in out:
            out[name] = lambda: run(*shape)
            if CUDA and wide:
                WIDE.add(name)

    for shape in shapes():
        m, k, n, r, rows = shape
        name = f"m{m} k{k} n{n} r{r} {rows if rows == 'ragged' else f'b{rows}'}"
        add(f"linear/m{m} k{k} n{n}", not of_a_bar(m, k, n, 0, 1), linear, m, k, n)
        add(f"low_rank_linear/{name}", not of_a_bar(*shape), update, *shape)
    for shape in pick([QUICK[0], QUICK[2]], [CPU[1]], [(4096, 4096, 4096, 16, b) for b in (1, 16)]):
        add("low_rank_linear/fwd+bwd m{} k{} n{} r{} b{}".format(*shape), False, gradients, *shape)
    layers = [(64, 8, 4096, 4096, 6144, 16, 2), (64, 8, 4096, 3072, 4096, 16, 1)]
    for shape in pick([(4, 2, 24, 32, 48, 4, 2)], [(8, 2, 256, 512, 512, 8, 2)], layers):
        add("low_rank_linear/e{} top{} m{} k{} n{} r{}".format(*shape), False, experts, *shape)
    merges = [(4096, 4096, r) for r in RANKS] + [(192, 576, 16), (1024, 4096, 16)]
    for shape in pick([(24, 48, 4)], [(4096, 4096, 16), (192, 576, 8), (768, 256, 8)], merges):
        add("low_rank_linear/merge k{} n{} r{}".format(*shape), not of_a_bar(1, *shape, 1), merge, *shape)
    shape = pick((64, 24, 4), (1024, 4096, 16), (4096, 4096, 16))
    add("low_rank_linear/shrink m{} k{} r{}".format(*shape), False, shrink, *shape)
    return out
