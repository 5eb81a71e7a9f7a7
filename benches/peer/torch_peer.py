"""PyTorch's side of the CPU comparison: the same cases as `cargo run --release -p hywu-benches --bin cpu_cases`.

Prints one JSON object: PyTorch's version, threads, parameters of the backbone, and {case: median milliseconds}. Written from
the description of the model in the crate `hywu-diffusion`; used by compare_cpu.py, which runs both programs in turn.
"""

import functools
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else 2
torch.set_num_threads(THREADS)
torch.manual_seed(0)


def median_ms(f, seconds=1.0, least=7):
    """Median of many calls after a warm-up; the same rule as the Rust side."""
    for _ in range(3):
        f()
    times, start = [], time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < seconds and len(times) < 1000):
        t = time.perf_counter()
        f()
        times.append(time.perf_counter() - t)
    return 1e3 * statistics.median(times)


def with_adapter(y, x, a, b, scale):
    """y + scale * (x a^T) b^T, one adapter per batch entry."""
    return torch.baddbmm(y, torch.bmm(x, a.mT), b.mT, alpha=scale)


def low_rank_linear(b, m, k, n, r):
    """x [b, m, k], one adapter per batch entry."""
    x, w, bias = torch.randn(b, m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    a, lb = torch.randn(b, r, k) / k**0.5, torch.randn(b, n, r)

    @torch.inference_mode()
    def run():
        return with_adapter(F.linear(x, w, bias), x, a, lb, 0.5)

    @torch.inference_mode()
    def plain():
        return F.linear(x, w, bias)

    return median_ms(run), median_ms(plain)


def attention(b, t, h, d, backward=False):
    """Fused projection [b, t, 3 h d] -> [b, t, h d]."""
    qkv = torch.randn(b, t, 3 * h * d, requires_grad=backward)
    grad = torch.randn(b, t, h * d)

    def forward():
        q, k, v = qkv.view(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, h * d)

    def train():
        qkv.grad = None
        forward().backward(grad)

    if backward:
        return median_ms(train)
    with torch.inference_mode():
        return median_ms(forward)


class RmsNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)


def modulated(y, scale, shift):
    """y [b, t, n] * (1 + scale) + shift, both [b, 1, n]."""
    return torch.addcmul(shift, y, 1 + scale)


def rotate(x, turns):
    """Turns the pairs of channels of x [b, h, t, d] by `turns`, complex [t, d / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2)


class Linear(nn.Linear):
    """Without a bias, with an optional adapter (a [b, r, in], b [b, out, r], scale) per batch entry."""

    def __init__(self, inner, outer):
        super().__init__(inner, outer, bias=False)

    def forward(self, x, lora=None):
        y = super().forward(x)
        return y if lora is None else with_adapter(y, x, *lora)


class Block(nn.Module):
    def __init__(self, width, head_dim, hidden, offset):
        super().__init__()
        self.heads, self.d = width // head_dim, head_dim
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q_norm, self.k_norm = RmsNorm(head_dim), RmsNorm(head_dim)
        self.qkv_proj, self.o_proj = Linear(width, 3 * width), Linear(width, width)
        self.gate_and_up_proj, self.down_proj = Linear(width, 2 * hidden), Linear(hidden, width)
        self.offset = nn.Parameter(torch.zeros(6 * width)) if offset else None

    def attention(self, x, turns, lora):
        b, t, _ = x.shape
        q, k, v = self.qkv_proj(x, lora.get("qkv_proj")).view(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), turns), rotate(self.k_norm(k), turns)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        return self.o_proj(y, lora.get("o_proj"))

    def mlp(self, x, lora):
        up, gate = self.gate_and_up_proj(x, lora.get("gate_and_up_proj")).chunk(2, -1)
        return self.down_proj(up * F.silu(gate), lora.get("down_proj"))

    def forward(self, x, turns, modulation=None, lora=None):
        lora = lora or {}
        if modulation is None:
            x = x + self.attention(self.norm1(x), turns, lora)
            return x + self.mlp(self.norm2(x), lora)
        scale1, shift1, gate1, scale2, shift2, gate2 = (modulation + self.offset)[:, None].chunk(6, -1)
        x = torch.addcmul(x, gate1, self.attention(modulated(self.norm1(x), scale1, shift1), turns, lora))
        return torch.addcmul(x, gate2, self.mlp(modulated(self.norm2(x), scale2, shift2), lora))


FEATURES, HIDDEN = 31, 32
COEFFICIENTS = 3 * FEATURES + 3 * HIDDEN + HIDDEN
SPLINE = (torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16).repeat(3, 1, 1, 1)
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
SOBEL = torch.stack([SOBEL, SOBEL.T])[:, None]


def smooth(x, hole):
    """One level of the a trous transform of [b, 3, h, w]."""
    pad = 2 * hole
    across = F.conv2d(F.pad(x, (pad, pad, 0, 0), "reflect"), SPLINE, dilation=(1, hole), groups=3)
    return F.conv2d(F.pad(across, (0, 0, pad, pad), "reflect"), SPLINE.mT, dilation=(hole, 1), groups=3)


def pixel_features(source, p):
    """[b, h, w, 3] -> [b, h, w, 31]: see hywu-kernels/src/ops/local_filter.rs."""
    b, h, w, _ = source.shape
    rgb = source.permute(0, 3, 1, 2)
    fine = smooth(rgb, 1)
    middle = smooth(fine, 2)
    coarse = smooth(middle, 4)
    luma = F.conv2d(fine, LUMA)
    edge = 0.25 * F.conv2d(F.pad(luma, (1, 1, 1, 1), "reflect"), SOBEL).square().sum(1, keepdim=True).sqrt()
    mean = F.interpolate(F.avg_pool2d(rgb, p), scale_factor=p)
    one = torch.ones_like(edge)
    place = (2 * (torch.arange(max(h, w)) % p) + 1) / p - 1
    colour = torch.cat([one, rgb], 1)
    x, y = place[:w].view(1, 1, 1, w) * colour, place[:h].view(1, 1, h, 1) * colour
    parts = [one, rgb, rgb * rgb, rgb * rgb.roll(-1, 1), fine, middle, coarse, edge, mean, x, y]
    return torch.cat([part.permute(0, 2, 3, 1) for part in parts], -1)


class Mini(nn.Module):
    """The backbone `mini`: see hywu-diffusion/src/backbone.rs and config.rs. No instruction here has padding, so none is masked."""

    def __init__(
        self, width=192, layers=6, head_dim=64, hidden=512, text_dim=64, text_len=20, text_layers=2, p=8, words=1000
    ):
        super().__init__()
        self.p, self.width, self.head_dim, self.text_len = p, width, head_dim, text_len
        self.patch_in = nn.Linear(8 * p * p, width)
        self.register_buffer("table", torch.randn(words, text_dim))
        self.text_in, self.text_position = nn.Linear(text_dim, width), nn.Parameter(torch.zeros(text_len, width))
        self.text = nn.ModuleList(Block(width, head_dim, hidden, False) for _ in range(text_layers))
        self.time_in, self.text_pool = nn.Linear(width, width), nn.Linear(width, width)
        # Six parts for the blocks, two for the norm before the head.
        self.time_out = nn.Linear(width, 8 * width)
        self.layers = nn.ModuleList(Block(width, head_dim, hidden, True) for _ in range(layers))
        self.norm, self.head = RmsNorm(width), nn.Linear(width, 3 * p * p + COEFFICIENTS)
        self.pixel_in = nn.Linear(FEATURES, HIDDEN, bias=False)
        half = width // 2
        # Only the condition uses these; they count as parameters on the other side.
        self.condition_mean, self.condition_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))
        self.register_buffer("frequencies", 1000 * 10000 ** (-torch.arange(half) / half))
        # Made once for each size of picture.
        self.turns = functools.cache(self.turns)

    def turns(self, rows, columns):
        """Rotary turns: image tokens at (row, column), then text token i at (64 + i, 64 + i)."""
        text = (64 + torch.arange(self.text_len))[:, None].expand(-1, 2)
        places = torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(columns)), text])
        quarter = self.head_dim // 4
        angles = places[:, :, None] * 10000 ** (-torch.arange(quarter) / quarter)
        return torch.polar(torch.ones(len(places), 2 * quarter), angles.flatten(1))

    def patchify(self, x):
        b, h, w, c = x.shape
        p = self.p
        return x.reshape(b, h // p, p, w // p, p, c).transpose(2, 3).reshape(b, -1, p * p * c)

    def unpatchify(self, x, h, w):
        b, p = len(x), self.p
        return x.view(b, h // p, w // p, p, p, -1).transpose(2, 3).reshape(b, h, w, -1)

    def local_filter(self, coef, source):
        """coef [b, n, COEFFICIENTS] -> [b, n, 3 p p]: linear . features + mix . relu(hidden + shift) of every pixel."""
        features = self.patchify(pixel_features(source, self.p)).view(-1, self.p**2, FEATURES)
        linear, mix, shift = coef.flatten(0, 1).split([3 * FEATURES, 3 * HIDDEN, HIDDEN], -1)
        active = (self.pixel_in(features) + shift[:, None]).relu_()
        out = torch.bmm(features, linear.unflatten(-1, (3, FEATURES)).mT)
        return torch.baddbmm(out, active, mix.unflatten(-1, (3, HIDDEN)).mT).view(*coef.shape[:2], -1)

    def forward(self, x_t, source, position, t, ids, loras=None):
        _, h, w, _ = source.shape
        y = self.text_in(F.embedding(ids, self.table)) + self.text_position
        for block in self.text:
            y = block(y, self.turns(0, 0))
        tokens = self.patch_in(self.patchify(torch.cat([x_t, source, position], -1)))
        n = tokens.shape[1]
        z = torch.cat([tokens, y], 1)
        angles = t[:, None] * self.frequencies
        whole = F.rms_norm(y.mean(1), y.shape[-1:], None, EPS)
        modulation = F.silu(self.time_in(torch.cat([angles.cos(), angles.sin()], -1)) + self.text_pool(whole))
        shared, scale, shift = self.time_out(modulation).split([6 * self.width, self.width, self.width], -1)
        turns = self.turns(h // self.p, w // self.p)
        for i, block in enumerate(self.layers):
            z = block(z, turns, shared, loras[i] if loras else None)
        out = self.head(modulated(self.norm(z[:, :n]), scale[:, None], shift[:, None]))
        residual, coef = out.split([3 * self.p**2, COEFFICIENTS], -1)
        return self.unpatchify(self.patchify(source) + residual + self.local_filter(coef, source), h, w)


PROJECTIONS = ["qkv_proj", "o_proj", "gate_and_up_proj", "down_proj"]


def pair(linear, batch, rank):
    """Random adapters of one projection."""
    inner, outer = linear.in_features, linear.out_features
    return torch.randn(batch, rank, inner) / inner**0.5, 0.1 * torch.randn(batch, outer, rank), 1.0


def mini(batch, size, lora, train):
    model = Mini()
    x_t, source, position, target = (torch.randn(batch, size, size, c) for c in (3, 3, 2, 3))
    t, ids = torch.rand(batch), torch.randint(1000, (batch, model.text_len))
    if not train:
        loras = None
        if lora:
            loras = [{name: pair(getattr(block, name), batch, 8) for name in PROJECTIONS} for block in model.layers]
        with torch.inference_mode():
            return median_ms(lambda: model(x_t, source, position, t, ids, loras), seconds=2.0)
    # Only matrices decay.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, 1e-3, (0.9, 0.95), fused=True)

    def step():
        optimiser.zero_grad()
        F.mse_loss(model(x_t, source, position, t, ids), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return median_ms(step, seconds=4.0)


def main():
    out = {}
    for b, m, k, n, r in [(1, 1024, 4096, 4096, 16), (32, 84, 192, 576, 8), (32, 84, 192, 1024, 8), (32, 84, 512, 192, 8), (1, 64, 768, 256, 8)]:
        name = f"b{b} m{m} k{k} n{n} r{r}"
        out[f"low_rank_linear/{name}"], out[f"linear/{name}"] = low_rank_linear(b, m, k, n, r)
    for b, t, h, d in [(32, 84, 3, 64), (16, 276, 3, 64), (1, 1024, 4, 64)]:
        out[f"attention/fwd b{b} t{t} h{h} d{d}"] = attention(b, t, h, d)
        out[f"attention/fwd+bwd b{b} t{t} h{h} d{d}"] = attention(b, t, h, d, backward=True)
    out["backbone/forward b32 64px"] = mini(32, 64, lora=False, train=False)
    out["backbone/forward b32 64px r8"] = mini(32, 64, lora=True, train=False)
    out["backbone/forward b8 128px"] = mini(8, 128, lora=False, train=False)
    out["backbone/train step b32 64px"] = mini(32, 64, lora=False, train=True)
    parameters = sum(p.numel() for p in Mini().parameters())
    print(json.dumps({"torch": torch.__version__, "threads": THREADS, "parameters": parameters, "ms": out}, indent=1))


if __name__ == "__main__":
    main()
