"""Attention in PyTorch: the cases of benches/src/cases/attention, under the same names.

scaled_dot_product_attention with every backend that takes the call (flash, cuDNN, memory-efficient, the plain formula), and what
else a user would reasonably choose: for spans flex_attention (compiled) and a dense mask; for ragged entries varlen_attn, nested
tensors, padding and a loop; for heads that share keys also keys repeated; for the generator's layers a transposed view with a copy
of the output, and copies of all. Norm and rotation are separate calls, eager and compiled. The fastest counts.

Operands are [b, s, heads, d] in memory, as a projection leaves them, and the output is wanted so too.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_low_rank import RAGGED, lengths
from torch_timing import ARGS, CUDA, DEVICE, measure, randn

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

EPS = 1e-6
LONG = [(4096, 4), (8192, 2), (16384, 1)]
# Channels, tokens, heads, heads of keys, entries, kind.
LAYERS = (128, 32, 32, 32, 5516, "layers")
SMALL = [(64, 84, 3, 3, 32, "qkv"), (64, 276, 3, 3, 16, "qkv"), (64, 1024, 4, 4, 1, "")]
KINDS = [
    (128, 8192, 16, 4, 2, ""),
    (128, 8192, 16, 16, 2, "causal"),
    (128, 8192, 16, 16, 2, "spans"),
    (128, 16384, 16, 16, RAGGED, "ragged"),
]
CPU = [
    (64, 1024, 4, 2, 1, "causal"),
    (64, 1024, 4, 4, 1, "spans"),
    (64, 1024, 4, 4, RAGGED, "ragged"),
    (64, 32, 4, 4, 128, "layers"),
]
QUICK = [
    (128, 129, 2, 2, 1, ""),
    (64, 77, 3, 3, 2, ""),
    (64, 17, 4, 2, 3, ""),
    (128, 130, 4, 2, 1, "causal"),
    (64, 140, 2, 2, 2, "spans"),
    (64, 320, 2, 1, RAGGED, "ragged"),
    (64, 6, 2, 2, 9, "layers"),
    (128, 32, 2, 2, 3, "layers"),
    (64, 33, 3, 3, 2, "qkv"),
    (128, 70, 2, 2, 1, "norm rotary"),
]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# The plain formula writes all scores: beyond so many bytes of them it is not tried.
MOST_SCORES = 2**30
# Ways that a first look finds slower than this times the fastest are not measured again.
FAR_BEHIND = 1.3
# What PyTorch says of a backend that does not take a call.
REFUSALS = ("No available kernel", "No viable backend", "was requested for varlen_attn")
# Cases that no bar depends on: timed for a shorter time, and in the first round only.
WIDE = set()


def plain(d, s, h, b, kind=""):
    return (d, s, h, h, b, kind)


def timed():
    """(pass, shape, does a bar depend on it): as benches/src/cases/attention/shapes.rs."""
    out = []

    def add(passes, shapes, bar):
        out.extend((p, shape, bar) for shape in shapes for p in passes)

    if ARGS.quick:
        add(["fwd"], QUICK, True)
        add(["bwd", "fwd+bwd"], QUICK[:9], True)
        return out
    if not CUDA:
        add(["fwd", "fwd+bwd"], SMALL, True)
        add(["fwd"], CPU, True)
        return out
    long = lambda d: [plain(d, s, 16, b) for s, b in LONG]
    grouped, causal, spans, ragged = KINDS
    add(["fwd"], long(128) + long(64), True)
    tails = [(4353, 3), (4480, 3), (5516, 3), (5632, 3), (77, 212), (128, 212)]
    add(["fwd"], [plain(128, s, 16, b) for s, b in tails], True)
    add(["bwd"], long(128), True)
    add(["fwd"], [LAYERS, (*long(128)[1][:5], "norm rotary"), spans], True)
    add(["fwd"], [grouped, causal, ragged, plain(64, 1024, 16, 4)], False)
    add(["bwd"], [causal, ragged, long(64)[1]], False)
    add(["fwd", "fwd+bwd"], SMALL, False)
    if ARGS.all:
        for d in (64, 128):
            add(["fwd", "bwd"], [plain(d, s, 16, b) for s, b in [(512, 32), (1024, 16), (2048, 8)]], False)
            add(["fwd", "bwd"], [plain(d, s, 16, b, "causal") for s, b in (LONG[0], LONG[2])], False)
            add(["fwd+bwd"], long(d)[:1], False)
        of_64 = lambda shape: (64, *shape[1:])
        add(["fwd"], [of_64(shape) for shape in (causal, spans, ragged, LAYERS)], False)
        add(["bwd"], [grouped, spans, LAYERS, long(64)[0], long(64)[2]], False)
    return out


def name_of(d, s, h, kv, b, kind):
    return " ".join(f"d{d} s{s} h{h} {f'kv{kv} ' if kv != h else ''}b{b} {kind}".split())


def spans(s):
    """Pictures in a text."""
    starts = [i * (s // 8) + s // 100 for i in range(8)]
    return [(start, start + max(s // 32, 1)) for start in starts]


def limits(s):
    """Keys that each query sees."""
    limit = torch.arange(1, s + 1, device=DEVICE)
    for start, end in spans(s):
        limit[start:end] = end
    return limit


def through(backend, call):
    """A call with one backend, which fails where that backend does not take it."""

    def run(*inputs):
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*inputs)

    return run


def sdpa(q, k, v, **options):
    """[.., s, heads, d] -> the same."""
    options |= {"enable_gqa": True} if k.shape[-2] != q.shape[-2] else {}
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(-2, -3)


def repeated(q, k, v, **options):
    """Every head of keys as often as it is used."""
    times = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(times, dim=-2) if times > 1 else x for x in (k, v))
    return sdpa(q, k, v, **options)


def by_backend(call, scores, name=""):
    """A call with all backends; on the CPU as PyTorch chooses."""
    if not CUDA:
        return {name or "eager": call}
    known = {n: b for n, b in BACKENDS.items() if n != "math" or scores <= MOST_SCORES}
    return {f"{name} {n}".strip(): through(b, call) for n, b in known.items()}


def rotated(x, weight, cos, sin):
    """Norm and rotation of [b, s, heads, d], by pairs of channels."""
    x = F.rms_norm(x, x.shape[-1:], weight, EPS)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((cos * a - sin * b, sin * a + cos * b), -1).flatten(-2).to(x.dtype)


def tables(s, d):
    angles = torch.arange(s)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
    return [f(angles)[:, None, :].to(DEVICE) for f in (torch.cos, torch.sin)]


def flex(s):
    """flex_attention of causal text with spans, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    limit = limits(s)
    mask = create_block_mask(lambda b, h, q, k: k < limit[q], None, None, s, s, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1]).transpose(1, 2)

    return call


def ragged(shape):
    """Ways for entries one behind the other: q, k, v are [tokens, heads, d]."""
    d, s, h, kv, b, _ = shape
    counts = lengths(s, "ragged")
    longest = max(counts)
    ends = torch.tensor([0, *counts]).cumsum(0)
    jags, offsets = ends.to(DEVICE), ends.to(DEVICE, torch.int32)
    owner = torch.repeat_interleave(torch.arange(b), torch.tensor(counts))
    slot = (owner * longest + torch.arange(s) - ends[owner]).to(DEVICE)
    # True: the key is one of the entry's.
    seen = (torch.arange(longest, device=DEVICE) < torch.tensor(counts, device=DEVICE)[:, None])[:, None, None, :]

    def pad(q, k, v):
        wide = lambda x: x.new_zeros(b * longest, *x.shape[1:]).index_copy(0, slot, x).view(b, longest, *x.shape[1:])
        return repeated(wide(q), wide(k), wide(v), attn_mask=seen).reshape(b * longest, h, d).index_select(0, slot)

    def loop(q, k, v):
        parts = zip(*(x.split(counts) for x in (q, k, v)))
        return torch.cat([sdpa(*(x[None] for x in part))[0] for part in parts])

    def nested(q, k, v):
        jagged = lambda x: torch.nested.nested_tensor_from_jagged(x, jags, min_seqlen=min(counts), max_seqlen=longest)
        q, k, v = (jagged(x).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    scores = b * h * longest**2 * 2
    calls = by_backend(loop, 0, "loop") | by_backend(pad, scores, "padded")
    if CUDA:
        if kv == h:
            calls |= {f"nested {n}": through(BACKENDS[n], nested) for n in ("flash", "cudnn")}
        if varlen_attn:
            same = {"enable_gqa": True} if kv != h else {}
            packed = lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest, **same)
            calls |= {f"varlen {n}": through(BACKENDS[n], packed) for n in ("flash", "cudnn")}
    return calls


def layers(shape):
    """Ways for an axis that is not the tokens': q, k, v are [s, b, heads, d]."""
    view = lambda q, k, v: sdpa(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1).contiguous()

    def copies(q, k, v):
        q, k, v = (x.permute(1, 2, 0, 3).contiguous() for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).contiguous()

    d, s, h, kv, b, _ = shape
    scores = b * h * s * s * 2
    return by_backend(view, scores, "view") | by_backend(copies, scores, "copies")


def ways_of(shape):
    """{way: q, k, v, .. -> output}."""
    d, s, h, kv, b, kind = shape
    scores = b * h * s * s * 2
    if kind == "ragged":
        return ragged(shape)
    if kind == "layers":
        return layers(shape)
    if kind == "qkv":
        call = lambda qkv: sdpa(*qkv.view(b, s, 3, h, d).unbind(2)).reshape(b, s, h * d)
        return by_backend(call, scores)
    if kind == "norm rotary":
        cos, sin = tables(s, d)
        calls = {}
        pair = lambda q, k, wq, wk: (rotated(q, wq, cos, sin), rotated(k, wk, cos, sin))
        for way, turn in ({"separate": pair} | ({"compiled": torch.compile(pair, dynamic=False)} if compiles() else {})).items():
            call = lambda q, k, v, wq, wk, turn=turn: sdpa(*turn(q, k, wq, wk), v)
            calls |= by_backend(call, scores, way)
        return calls
    if kind == "causal":
        call = lambda q, k, v: sdpa(q, k, v, is_causal=True)
    elif kind == "spans":
        mask = torch.arange(s, device=DEVICE) < limits(s)[:, None]
        call = lambda q, k, v: sdpa(q, k, v, attn_mask=mask)
        more = {"flex": flex(s)} if compiles() else {}
        return by_backend(call, scores, "mask") | more
    else:
        call = sdpa
    calls = by_backend(call, scores)
    if kv != h:
        options = {"is_causal": True} if kind == "causal" else {}
        calls |= by_backend(lambda q, k, v: repeated(q, k, v, **options), scores, "repeated")
    return calls


def compiles():
    return CUDA and not ARGS.no_compile and not ARGS.quick


def operands(shape, grad):
    d, s, h, kv, b, kind = shape
    leaf = lambda *sizes: randn(*sizes).requires_grad_(grad)
    if kind == "qkv":
        return (leaf(b, s, 3 * h * d),)
    axes = {"ragged": (s,), "layers": (s, b)}.get(kind, (b, s))
    norm = (randn(d) * 0.3 + 1, randn(d) * 0.3 + 1) if kind == "norm rotary" else ()
    return leaf(*axes, h, d), leaf(*axes, kv, d), leaf(*axes, kv, d), *norm


def attention(which, shape, bar):
    """Times the fastest way; all are looked at for a short time first."""
    grad = which != "fwd"

    def prepared(call):
        """(what makes the operands, what is timed) of a way."""
        if not grad:
            return lambda: operands(shape, False), call

        def both(*inputs):
            *leaves, dy = inputs
            y = call(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        def backward(leaves, y, dy):
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        def make():
            leaves = operands(shape, True)
            with torch.enable_grad():
                y = call(*leaves)
            dy = torch.randn_like(y)
            return (leaves, y, dy) if which == "bwd" else (*leaves, dy)

        return make, backward if which == "bwd" else both

    looks, errors, results = {}, {}, {}
    calls = {way: prepared(call) for way, call in ways_of(shape).items()}
    for way, (make, call) in calls.items():
        try:
            looks[way] = measure(make, call, grad=grad, short=True)
        except Exception as e:  # noqa: BLE001: whatever it is, the next way may work.
            errors[way] = f"{type(e).__name__}: {e}"[:500]
        if CUDA:
            torch.cuda.empty_cache()
    if not looks:
        raise RuntimeError("; ".join(f"{way}: {e}" for way, e in errors.items()))
    results = dict(looks)
    least = min(look["ms"] for look in looks.values())
    if CUDA and bar:
        for way, look in looks.items():
            if look["ms"] <= FAR_BEHIND * least:
                results[way] = measure(*calls[way], grad=grad)
    # Those that were only looked at are slower.
    best = min(results, key=lambda way: results[way]["ms"])
    # A backend that does not take a call is no failure.
    refused = [way for way, e in errors.items() if any(text in e for text in REFUSALS)]
    return results[best] | {
        "way": best,
        "ways": {way: r["ms"] for way, r in results.items()},
        "refused": refused,
        "errors": {way: e for way, e in errors.items() if way not in refused},
    }


def cases():
    """{name: function that times it}."""
    out = {}
    for which, shape, bar in timed():
        name = f"attention/{which} {name_of(*shape)}"
        out[name] = lambda which=which, shape=shape, bar=bar: attention(which, shape, bar)
        if CUDA and not bar:
            WIDE.add(name)
    return out
