"""The backbone `mini` in PyTorch, written from the description of the model in the crate `hywu-diffusion`."""

import torch
import torch.nn.functional as F
from torch import nn

EPS = 1e-6


def with_adapter(y, x, a, b, scale):
    """y + scale * (x a^T) b^T, one adapter per batch entry."""
    return torch.baddbmm(y, torch.bmm(x, a.mT), b.mT, alpha=scale)


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
    """Turns the pairs of channels of x [b, h, t, d] by `turns`, complex [t, d / 2] or, as bf16 has no complex numbers, (cos, sin)."""
    pairs = x.unflatten(-1, (-1, 2))
    if isinstance(turns, torch.Tensor):
        return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)
    (u, v), (cos, sin) = pairs.unbind(-1), turns
    return torch.stack([u * cos - v * sin, u * sin + v * cos], -1).flatten(-2).to(x.dtype)


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


def filters():
    """The spline, the weights of luma, and Sobel's pair."""
    spline = (torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16).repeat(3, 1, 1, 1)
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    return {
        "spline": spline,
        "luma": torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1),
        "sobel": torch.stack([sobel, sobel.T])[:, None],
    }


def smooth(x, spline, hole):
    """One level of the a trous transform of [b, 3, h, w]."""
    pad = 2 * hole
    across = F.conv2d(F.pad(x, (pad, pad, 0, 0), "reflect"), spline, dilation=(1, hole), groups=3)
    return F.conv2d(F.pad(across, (0, 0, pad, pad), "reflect"), spline.mT, dilation=(hole, 1), groups=3)


def pixel_features(source, p, spline, luma, sobel):
    """[b, h, w, 3] -> [b, h, w, 31]: see hywu-kernels/src/ops/local_filter.rs."""
    b, h, w, _ = source.shape
    rgb = source.permute(0, 3, 1, 2)
    fine = smooth(rgb, spline, 1)
    middle = smooth(fine, spline, 2)
    coarse = smooth(middle, spline, 4)
    grey = F.conv2d(fine, luma)
    edge = 0.25 * F.conv2d(F.pad(grey, (1, 1, 1, 1), "reflect"), sobel).square().sum(1, keepdim=True).sqrt()
    mean = F.interpolate(F.avg_pool2d(rgb, p), scale_factor=p)
    one = torch.ones_like(edge)
    place = (2 * (torch.arange(max(h, w), device=source.device) % p) + 1) / p - 1
    colour = torch.cat([one, rgb], 1)
    x, y = place[:w].view(1, 1, 1, w) * colour, place[:h].view(1, 1, h, 1) * colour
    parts = [one, rgb, rgb * rgb, rgb * rgb.roll(-1, 1), fine, middle, coarse, edge, mean, x, y]
    return torch.cat([part.permute(0, 2, 3, 1) for part in parts], -1)


def patchify(x, p):
    b, h, w, c = x.shape
    return x.reshape(b, h // p, p, w // p, p, c).transpose(2, 3).reshape(b, -1, p * p * c)


def local_filter(coef, features, hidden):
    """coef [n, COEFFICIENTS], features [n, pixels, FEATURES], hidden [n, pixels, HIDDEN] -> [n, pixels, 3]."""
    linear, mix, shift = coef.split([3 * FEATURES, 3 * HIDDEN, HIDDEN], -1)
    active = (hidden + shift[:, None]).relu_()
    out = torch.bmm(features, linear.unflatten(-1, (3, FEATURES)).mT)
    return torch.baddbmm(out, active, mix.unflatten(-1, (3, HIDDEN)).mT)


class Mini(nn.Module):
    """The backbone `mini`: see hywu-diffusion/src/backbone and config.rs. No instruction here has padding, so none is masked."""

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
        for name, tensor in filters().items():
            self.register_buffer(name, tensor)
        # Rotary turns by size of picture.
        self.known = {}

    def computing_in(self, dtype):
        """Weights and table in `dtype`; what the picture itself goes through stays in f32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        self.table = self.table.to(dtype)
        return self

    def turns(self, rows, columns):
        """Rotary turns, made once: image tokens at (row, column), then text token i at (64 + i, 64 + i)."""
        if (rows, columns) not in self.known:
            self.known[rows, columns] = self.new_turns(rows, columns)
        return self.known[rows, columns]

    def new_turns(self, rows, columns):
        text = (64 + torch.arange(self.text_len))[:, None].expand(-1, 2)
        places = torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(columns)), text])
        quarter = self.head_dim // 4
        angles = places[:, :, None] * 10000 ** (-torch.arange(quarter) / quarter)
        angles = angles.flatten(1).to(self.table.device)
        if self.table.dtype == torch.float32:
            return torch.polar(torch.ones_like(angles), angles)
        return angles.cos(), angles.sin()

    def unpatchify(self, x, h, w):
        b, p = len(x), self.p
        return x.view(b, h // p, w // p, p, p, -1).transpose(2, 3).reshape(b, h, w, -1)

    def forward(self, x_t, source, position, t, ids, loras=None):
        b, h, w, _ = source.shape
        p, dtype = self.p, self.table.dtype
        y = self.text_in(F.embedding(ids, self.table)) + self.text_position
        for block in self.text:
            y = block(y, self.turns(0, 0))
        tokens = self.patch_in(patchify(torch.cat([x_t, source, position], -1).to(dtype), p))
        n = tokens.shape[1]
        z = torch.cat([tokens, y], 1)
        angles = t[:, None] * self.frequencies
        whole = F.rms_norm(y.mean(1), y.shape[-1:], None, EPS)
        time = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        modulation = F.silu(self.time_in(time) + self.text_pool(whole))
        shared, scale, shift = self.time_out(modulation).split([6 * self.width, self.width, self.width], -1)
        turns = self.turns(h // p, w // p)
        for i, block in enumerate(self.layers):
            z = block(z, turns, shared, loras[i] if loras else None)
        out = self.head(modulated(self.norm(z[:, :n]), scale[:, None], shift[:, None]))
        residual, coef = out.split([3 * p * p, COEFFICIENTS], -1)
        features = pixel_features(source, p, self.spline, self.luma, self.sobel).to(dtype)
        features = patchify(features, p).view(-1, p * p, FEATURES)
        change = local_filter(coef.flatten(0, 1), features, self.pixel_in(features)).view(b, n, -1)
        return self.unpatchify(patchify(source, p) + (residual + change), h, w)
