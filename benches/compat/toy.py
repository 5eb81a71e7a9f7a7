"""A toy transformer with the published backbone's names: fused q, k, v in groups, a fused MLP, experts. `split` is the same function
with a linear layer for each projection."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEAD, HEADS, KV_HEADS, HIDDEN, EXPERTS, LAYERS = 32, 8, 4, 2, 24, 3, 2
QKV = (HEADS + 2 * KV_HEADS) * HEAD
# Rows of q, k and v in one group of the fused projection: a key/value head and its queries.
QKV_ROWS = [HEADS // KV_HEADS * HEAD, HEAD, HEAD]

# Modules as an adapter of this project has them: in, out, with the experts in front where there are some.
MODULES = {
    f"model.layers.{n}.{path}": dims
    for n in range(LAYERS)
    for path, dims in {
        "self_attn.qkv_proj": (WIDTH, QKV),
        "self_attn.o_proj": (HEADS * HEAD, WIDTH),
        "mlp.shared_mlp.gate_and_up_proj": (WIDTH, 2 * HIDDEN),
        "mlp.shared_mlp.down_proj": (HIDDEN, WIDTH),
        "mlp.experts.w1": (EXPERTS, WIDTH, HIDDEN),
        "mlp.experts.w2": (EXPERTS, HIDDEN, WIDTH),
        "mlp.experts.w3": (EXPERTS, WIDTH, HIDDEN),
    }.items()
}


def linear(inner, outer):
    return nn.Linear(inner, outer, bias=False)


class Attention(nn.Module):
    def __init__(self, split):
        super().__init__()
        if split:
            self.q_proj, self.o_proj = linear(WIDTH, HEADS * HEAD), linear(HEADS * HEAD, WIDTH)
            self.k_proj, self.v_proj = linear(WIDTH, KV_HEADS * HEAD), linear(WIDTH, KV_HEADS * HEAD)
        else:
            self.qkv_proj, self.o_proj = linear(WIDTH, QKV), linear(HEADS * HEAD, WIDTH)

    def forward(self, x):
        b, s, _ = x.shape
        if hasattr(self, "qkv_proj"):
            q, k, v = self.qkv_proj(x).view(b, s, KV_HEADS, -1).split(QKV_ROWS, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.reshape(b, s, -1, HEAD).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, s, -1))


class Mlp(nn.Module):
    def __init__(self, split):
        super().__init__()
        if split:
            self.up_proj, self.gate_proj = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN)
        else:
            self.gate_and_up_proj = linear(WIDTH, 2 * HIDDEN)
        self.down_proj = linear(HIDDEN, WIDTH)

    def forward(self, x):
        if hasattr(self, "gate_and_up_proj"):
            up, gate = self.gate_and_up_proj(x).chunk(2, -1)
        else:
            up, gate = self.up_proj(x), self.gate_proj(x)
        return self.down_proj(up * F.silu(gate))


class Moe(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.shared_mlp = Mlp(split)
        self.experts = nn.ModuleList(Mlp(split) for _ in range(EXPERTS))

    def forward(self, x):
        # A fixed routing: every expert gets its share of the tokens.
        parts = zip(self.experts, x.tensor_split(EXPERTS, 1))
        return self.shared_mlp(x) + torch.cat([expert(part) for expert, part in parts], 1)


class Layer(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.self_attn, self.mlp = Attention(split), Moe(split)

    def forward(self, x):
        x = x + self.self_attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class Toy(nn.Module):
    def __init__(self, split=False):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer(split) for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.model.layers:
            x = layer(x)
        return x


def split_weights(fused):
    """Weights of the fused toy for the split one."""
    out = {}
    for name, w in fused.items():
        if "qkv_proj" in name:
            parts = [p.reshape(-1, WIDTH) for p in w.view(KV_HEADS, -1, WIDTH).split(QKV_ROWS, 1)]
            out |= {name.replace("qkv_proj", f"{p}_proj"): t.contiguous() for p, t in zip("qkv", parts)}
        elif "gate_and_up_proj" in name:
            parts = zip(("up_proj", "gate_proj"), w.chunk(2))
            out |= {name.replace("gate_and_up_proj", p): t.contiguous() for p, t in parts}
        else:
            out[name] = w
    return out


def updated(weights, adapter):
    """W + scale B A by the formula of the format, in f64."""
    scale, out = adapter["scale"].double(), {k: v.double() for k, v in weights.items()}
    for module, dims in MODULES.items():
        delta = scale * adapter[f"{module}.lora_B"][0].double() @ adapter[f"{module}.lora_A"][0].double()
        if len(dims) == 2:
            out[f"{module}.weight"] += delta
            continue
        experts, w = module.rsplit(".", 1)
        for e in range(EXPERTS):
            if w == "w2":
                out[f"{experts}.{e}.down_proj.weight"] += delta[e]
            else:
                half = slice(0, HIDDEN) if w == "w3" else slice(HIDDEN, None)
                out[f"{experts}.{e}.gate_and_up_proj.weight"][half] += delta[e]
    return {k: v.float() for k, v in out.items()}
