"""PyTorch's side of the CPU comparison: the same cases as `cargo run --release -p hywu-benches --bin cpu_cases`.

Prints one JSON object {case: median milliseconds}. Written from the description of the model in the crate
`hywu-diffusion`; used by compare_cpu.py, which runs both programs in turn.
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

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


def low_rank_linear(b, m, k, n, r):
    """x [b, m, k], one adapter per batch entry."""
    x, w, bias = torch.randn(b, m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    a, lb = torch.randn(b, r, k) / k**0.5, torch.randn(b, n, r)

    @torch.inference_mode()
    def run():
        y = F.linear(x, w, bias)
        return y + 0.5 * torch.bmm(torch.bmm(x, a.transpose(1, 2)), lb.transpose(1, 2))

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
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def rotate(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Linear(nn.Linear):
    """With an optional adapter (a [b, r, in], b [b, out, r], scale) per batch entry."""

    def forward(self, x, lora=None):
        y = super().forward(x)
        if lora is not None:
            a, b, scale = lora
            y = y + scale * torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))
        return y


class Block(nn.Module):
    def __init__(self, width, head_dim, hidden, modulated):
        super().__init__()
        self.heads, self.d = width // head_dim, head_dim
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q_norm, self.k_norm = RmsNorm(head_dim), RmsNorm(head_dim)
        self.qkv_proj, self.o_proj = Linear(width, 3 * width), Linear(width, width)
        self.gate_and_up_proj, self.down_proj = Linear(width, 2 * hidden), Linear(hidden, width)
        self.offset = nn.Parameter(torch.zeros(6 * width)) if modulated else None

    def forward(self, x, rope, modulation=None, lora=None):
        lora = lora or {}
        m = [None] * 6
        if modulation is not None:
            m = (modulation + self.offset)[:, None].chunk(6, -1)

        def mod(y, scale, shift):
            return y if scale is None else y * (1 + scale) + shift

        b, t, _ = x.shape
        y = self.qkv_proj(mod(self.norm1(x), m[0], m[1]), lora.get("qkv_proj"))
        q, k, v = y.view(b, t, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        y = self.o_proj(y, lora.get("o_proj"))
        x = x + (y if m[2] is None else m[2] * y)
        up, gate = self.gate_and_up_proj(mod(self.norm2(x), m[3], m[4]), lora.get("gate_and_up_proj")).chunk(2, -1)
        y = self.down_proj(up * F.silu(gate), lora.get("down_proj"))
        return x + (y if m[5] is None else m[5] * y)


FEATURES = 31
SPLINE = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])


def smooth(x, hole):
    """One level of the a trous transform of [b, 3, h, w]."""
    pad = 2 * hole
    across = F.conv2d(F.pad(x, (pad, pad, 0, 0), "reflect"), SPLINE.view(1, 1, 1, 5).repeat(3, 1, 1, 1), dilation=(1, hole), groups=3)
    return F.conv2d(F.pad(across, (0, 0, pad, pad), "reflect"), SPLINE.view(1, 1, 5, 1).repeat(3, 1, 1, 1), dilation=(hole, 1), groups=3)


def pixel_features(source, p):
    """[b, h, w, 3] -> [b, h, w, 31]: see hywu-kernels/src/ops/local_filter.rs."""
    b, h, w, _ = source.shape
    rgb = source.permute(0, 3, 1, 2)
    fine = smooth(rgb, 1)
    middle = smooth(fine, 2)
    coarse = smooth(middle, 4)
    luma = (fine * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    slopes = F.conv2d(F.pad(luma, (1, 1, 1, 1), "reflect"), torch.stack([SOBEL, SOBEL.T])[:, None])
    edge = 0.25 * slopes.square().sum(1, keepdim=True).sqrt()
    mean = F.interpolate(F.avg_pool2d(rgb, p), scale_factor=p)
    one = torch.ones_like(edge)
    place = (2 * (torch.arange(max(h, w)) % p) + 1) / p - 1
    colour = torch.cat([one, rgb], 1)
    x, y = place[:w].view(1, 1, 1, w) * colour, place[:h].view(1, 1, h, 1) * colour
    parts = [one, rgb, rgb * rgb, rgb * rgb.roll(-1, 1), fine, middle, coarse, edge, mean, x, y]
    return torch.cat(parts, 1).permute(0, 2, 3, 1)


class Mini(nn.Module):
    """The backbone `mini`: see hywu-diffusion/src/backbone.rs."""

    def __init__(self, width=192, layers=6, head_dim=64, hidden=512, text_dim=64, text_len=20, text_layers=2, p=8):
        super().__init__()
        self.p, self.width, self.text_len = p, width, text_len
        self.patch_in = nn.Linear(8 * p * p, width)
        self.text_in, self.text_pos = nn.Linear(text_dim, width), nn.Parameter(torch.zeros(text_len, width))
        self.text = nn.ModuleList(Block(width, head_dim, hidden, False) for _ in range(text_layers))
        self.time_in, self.text_pool = nn.Linear(width, width), nn.Linear(width, width)
        self.time_out = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(Block(width, head_dim, hidden, True) for _ in range(layers))
        self.norm, self.head = RmsNorm(width), nn.Linear(width, 3 * p * p + 3 * FEATURES)
        half = width // 2
        self.register_buffer("freq", 1000 * 10000 ** (-torch.arange(half) / half))

    def rope(self, n):
        angles = torch.randn(n, 32)  # same cost whatever the angles
        return angles.cos(), angles.sin()

    def patchify(self, x):
        b, h, w, c = x.shape
        p = self.p
        return x.view(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)

    def forward(self, x_t, source, position, t, text, loras=None):
        b, h, w, _ = source.shape
        tokens = self.patch_in(self.patchify(torch.cat([x_t, source, position], -1)))
        y = self.text_in(text) + self.text_pos
        for block in self.text:
            y = block(y, self.rope(self.text_len))
        n = tokens.shape[1]
        z = torch.cat([tokens, y.repeat_interleave(b // y.shape[0], 0)], 1)
        emb = t[:, None] * self.freq
        whole = self.text_pool(y.mean(1)).repeat_interleave(b // y.shape[0], 0)
        modulation = self.time_out(F.silu(self.time_in(torch.cat([emb.cos(), emb.sin()], -1)) + whole))
        rope = self.rope(n + self.text_len)
        for i, block in enumerate(self.layers):
            z = block(z, rope, modulation, loras[i] if loras else None)
        out = self.head(self.norm(z[:, :n]))
        residual, coef = out[..., : 3 * self.p**2], out[..., 3 * self.p**2 :]
        s = self.patchify(source)
        features = self.patchify(pixel_features(source, self.p)).view(b, n, -1, FEATURES)
        filtered = features @ coef.view(b, n, 3, FEATURES).transpose(2, 3)
        return s + filtered.reshape(s.shape) + residual


def mini(batch, crops, size, lora, train):
    model = Mini()
    x_t, source, position = (torch.randn(batch, size, size, c) for c in (3, 3, 2))
    t, text, target = torch.rand(batch), torch.randn(batch // crops, 20, 64), torch.randn(batch, (size // 8) ** 2, 192)
    loras = None
    if lora:
        shapes = {"qkv_proj": (192, 576), "o_proj": (192, 192), "gate_and_up_proj": (192, 1024), "down_proj": (512, 192)}
        loras = [
            {n: (torch.randn(batch, 8, i) / i**0.5, 0.1 * torch.randn(batch, o, 8), 1.0) for n, (i, o) in shapes.items()}
            for _ in model.layers
        ]
    if not train:
        with torch.inference_mode():
            return median_ms(lambda: model(x_t, source, position, t, text, loras), seconds=2.0)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.01, foreach=True)

    def step():
        optimiser.zero_grad()
        loss = ((model(x_t, source, position, t, text) - target) ** 2).mean()
        loss.backward()
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
    out["backbone/forward b32 64px"] = mini(32, 1, 64, lora=False, train=False)
    out["backbone/forward b32 64px r8"] = mini(32, 1, 64, lora=True, train=False)
    out["backbone/forward b8 128px"] = mini(8, 1, 128, lora=False, train=False)
    out["backbone/train step b32 64px"] = mini(32, 1, 64, lora=False, train=True)
    print(json.dumps({"torch": torch.__version__, "threads": THREADS, "ms": out}, indent=1))


if __name__ == "__main__":
    main()
