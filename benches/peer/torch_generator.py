"""The parameter generator in plain PyTorch: condition in, adapter out, from the published files.

    torch_generator.py --golden DIR [DIR ..]

reads config.json, the weights and condition.safetensors of each folder, computes in f32 on the CPU and compares with
expected.safetensors: exit code 1 where a tensor is missing, has another shape or is off by more than 2e-5. A folder of folders stands
for all of them. What `hywu generate` wrote beside a checkpoint is compared in the same way. Needs safetensors.

On CUDA weights and products are bf16, norms and the residual stream f32. Nothing is worked on in chunks: at the published size and
4000 tokens of condition the weights take 16 GB, the residual stream and its norm 3 GB each, the hidden rows of a feed-forward layer
and their activation 6 GB each, and 80 GB hold all of it.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

EPS, THETA = 1e-6, 10000.0
# In this order: of those that take a call, cuDNN is the fastest on Hopper.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DEFAULT_MAPPING = {
    "self_attn.qkv_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
    "self_attn.o_proj": {"lora_A_dim": 4096, "lora_B_dim": 4096},
    "mlp.shared_mlp.gate_and_up_proj": {"lora_A_dim": 4096, "lora_B_dim": 6144},
    "mlp.shared_mlp.down_proj": {"lora_A_dim": 3072, "lora_B_dim": 4096},
    "mlp.experts": {
        "type": "grouped",
        "num_experts": 64,
        "sub_weights": {
            "w1": {"lora_A_dim": 4096, "lora_B_dim": 3072},
            "w2": {"lora_A_dim": 3072, "lora_B_dim": 4096},
            "w3": {"lora_A_dim": 4096, "lora_B_dim": 3072},
        },
    },
}


@dataclasses.dataclass
class Config:
    """config.json, with the published size as default; the order of `pg_mapping` is that of the file."""

    num_base_model_layers: int = 32
    rank: int = 16
    alpha: float = 64
    token_dim: int = 1024
    output_dim: int = 1024
    dim_accumulation: int = 4
    d_model: int = 4096
    head_dim: int = 128
    num_pg_layers: int = 24
    input_dim: int = 4096
    prefix: str = "model.layers."
    pg_mapping: dict | None = None

    def __post_init__(self):
        self.pg_mapping = self.pg_mapping or DEFAULT_MAPPING
        if self.output_dim != self.token_dim:
            raise ValueError(f"output_dim {self.output_dim} must equal token_dim {self.token_dim}")
        paths = [path for path, *_ in self.modules()]
        if any(a != b and a in b for a in paths for b in paths):
            raise ValueError("a path in pg_mapping is part of another: their order would be another")
        counts = {"A": 0, "B": 0}
        for kind, _, numel, _ in self.parameters():
            counts[kind] += self.tokens_of(numel)
        # Tokens of lora_A and of both, positions of a token and of a layer.
        self.tokens_a, self.tokens = counts["A"], sum(counts.values())
        self.width = self.rank // self.dim_accumulation
        self.positions = self.tokens * self.width

    @classmethod
    def read(cls, path):
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in json.loads(path.read_text()).items() if k in known})

    def modules(self):
        """(path, experts or none, inner, outer) of each module, in order."""
        out = []
        for path, entry in self.pg_mapping.items():
            grouped = entry.get("type") == "grouped"
            parts = {f"{path}.{name}": sub for name, sub in entry["sub_weights"].items()} if grouped else {path: entry}
            experts = (entry["num_experts"],) if grouped else ()
            out += [(name, experts, sub["lora_A_dim"], sub["lora_B_dim"]) for name, sub in parts.items()]
        return out

    def parameters(self):
        """(A or B, key, numbers, shape) of what a layer of the base model gets: every lora_A, then every lora_B."""
        modules, r = self.modules(), self.rank
        shapes = [("A", path, (*experts, r, inner)) for path, experts, inner, _ in modules]
        shapes += [("B", path, (*experts, outer, r)) for path, experts, _, outer in modules]
        return [(kind, f"{path}.lora_{kind}", math.prod(shape), shape) for kind, path, shape in shapes]

    def tokens_of(self, numel):
        return -(-numel // (self.rank * self.token_dim))

    def flops(self, length):
        """Operations of one forward pass with so many tokens of condition, a multiplication and an addition each one."""
        d, k, n, s = self.d_model, self.num_pg_layers, self.num_base_model_layers, self.positions
        products = 36 * d * d * k * n * s + (4 * k * d * d + 2 * self.input_dim * d) * length
        ends = 2 * n * self.tokens * self.rank * self.output_dim * (d // self.dim_accumulation)
        return products + ends + 4 * k * n * s * d * (n + s + length)


def turns(axes):
    """cos and sin of the angles of rotary positions, [positions, 1 (heads), head_dim / 2, 2]: `axes` has (coordinates, channels).

    Angles are rounded to f32, whatever the model computes in.
    """
    angles = []
    for at, channels in axes:
        exponents = torch.arange(0, channels, 2, device=at.device).float() / channels
        angles.append(at.float()[:, None] * (1.0 / THETA**exponents))
    angles = torch.cat(angles, -1)[:, None]
    return torch.stack((angles.cos(), angles.sin()), -1)


def rotate(x, turn):
    """Neighbouring channels as complex numbers, turned in f32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # A compiler makes one pass of this; eager PyTorch takes fewer passes for complex numbers.
        (re, im), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        pairs = torch.stack((cos * re - sin * im, sin * re + cos * im), -1)
    else:
        pairs = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))
    return pairs.flatten(-2).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm in f32."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), EPS)


class Attention(nn.Module):
    """Along one axis of [.., channels]."""

    def __init__(self, d, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x, memory, turn, turn_memory, axis=-2):
        def heads(linear, x, turn=None):
            y = linear(x).unflatten(-1, (-1, self.head_dim))
            y = y if turn is None else rotate(y, turn)
            # [entries, heads, tokens, channels]
            return y.movedim(axis - 1, -2).flatten(0, -4)

        q, k, v = heads(self.W_q, x, turn), heads(self.W_k, memory, turn_memory), heads(self.W_v, memory)
        y = F.scaled_dot_product_attention(q, k, v)
        if axis == -2:
            return self.W_o(y.transpose(1, 2).reshape(x.shape))
        b, n, s, _ = x.shape
        return self.W_o(y.unflatten(0, (b, s)).movedim(-2, 1).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        return self.fc2(F.silu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, d, head_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (Norm(d) for _ in range(4))
        self.self_attn_n, self.self_attn_hw, self.self_attn_cross = (Attention(d, head_dim) for _ in range(3))
        self.feed_forward = FeedForward(d)

    def forward(self, x, e, layer, token, query, key):
        """x [b, layers, positions, d] in f32, e [b, length, d], and the turns of each kind of position."""
        h = self.norm1(x).to(e.dtype)
        x = x + self.self_attn_n(h, h, layer[:, None], layer[:, None], axis=-3)
        h = self.norm2(x).to(e.dtype)
        x = x + self.self_attn_hw(h, h, token, token)
        h = self.norm3(x).to(e.dtype).flatten(1, 2)
        x = x + self.self_attn_cross(h, e, query, key).view(x.shape)
        return x + self.feed_forward(self.norm4(x).to(e.dtype))


class Transformer(nn.Module):
    """What the published names call `model`: the parts of a generator behind its input."""

    def __init__(self, c):
        super().__init__()
        d, row = c.d_model, c.d_model // c.dim_accumulation
        self.norm_input, self.norm_tokens, self.norm_final = (Norm(d) for _ in range(3))
        self.hw_pos = nn.Embedding(c.tokens * c.rank, row)
        self.layer_pos = nn.Embedding(c.num_base_model_layers, row)
        self.proj_out_A, self.proj_out_B = (nn.Linear(row, c.output_dim) for _ in range(2))
        self.blocks = nn.ModuleList(Block(d, c.head_dim) for _ in range(c.num_pg_layers))


class Generator(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden_in = nn.Linear(config.input_dim, config.d_model)
        self.model = Transformer(config)

    @classmethod
    def random(cls, config, device, dtype):
        """Random weights, made where they are used: products keep the size of what goes in, norms are near 1, biases small."""
        with torch.device("meta"):
            made = cls(config).to(dtype)
        made.to_empty(device=device)
        with torch.no_grad():
            for name, w in made.named_parameters():
                if "norm" in name:
                    w.normal_(1.0, 0.02)
                else:
                    w.normal_(0.0, 0.02 if w.dim() == 1 else w.shape[1] ** -0.5)
        return made

    @classmethod
    def load(cls, folder, dtype):
        """From a folder with config.json and one file of weights or several."""
        from safetensors.torch import load_file

        made, weights = cls(Config.read(folder / "config.json")), {}
        index = folder / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for shard in shards:
            weights |= load_file(folder / shard)
        made.load_state_dict(weights)
        return made.to(dtype)

    def positions(self, length, device):
        """The turns of layers, of positions in a layer, of all positions as queries, and of the condition."""
        c = self.config
        count = lambda n: torch.arange(n, device=device)
        n, s, half = c.num_base_model_layers, c.positions, c.head_dim // 2
        token, w = count(s) // c.width, count(s) % c.width
        key = count(length) + max(c.tokens, c.width)
        return (
            turns([(count(n), 2 * half)]),
            turns([(token, half), (w, half)]),
            turns([(count(n).repeat_interleave(s), half), (count(s).repeat(n), half)]),
            turns([(key, half), (key, half)]),
        )

    def forward(self, condition, step=Block.__call__):
        """{key: tensor} from a condition [b, length, input_dim] or [b, 1, length, input_dim]; `step` runs a block."""
        c, m = self.config, self.model
        dtype = self.hidden_in.weight.dtype
        x = condition.to(dtype)
        x = x.squeeze(1) if x.dim() == 4 else x
        b, length, _ = x.shape
        e = m.norm_input(self.hidden_in(x)).to(dtype)
        codes = m.hw_pos.weight.view(c.positions, c.dim_accumulation, -1)
        grid = codes + m.layer_pos.weight[:, None, None]
        x = m.norm_tokens(grid.flatten(-2)).expand(b, -1, -1, -1)
        positions = self.positions(length, x.device)
        with sdpa_kernel(BACKENDS, set_priority=True):
            for block in m.blocks:
                x = step(block, x, e, *positions)
        y = m.norm_final(x).to(dtype).view(b, c.num_base_model_layers, c.tokens, c.rank, -1)
        tokens = {"A": m.proj_out_A(y[:, :, : c.tokens_a]), "B": m.proj_out_B(y[:, :, c.tokens_a :])}
        return self.cut(tokens)

    def cut(self, tokens):
        """The tokens of each parameter, without what pads the last."""
        c, out = self.config, {}
        for layer in range(c.num_base_model_layers):
            start = {"A": 0, "B": 0}
            for kind, key, numel, shape in c.parameters():
                count = c.tokens_of(numel)
                own = tokens[kind][:, layer, start[kind] : start[kind] + count]
                out[f"{c.prefix}{layer}.{key}"] = own.flatten(1)[:, :numel].view(-1, *shape)
                start[kind] += count
        scale = torch.tensor(c.alpha / c.rank, dtype=tokens["A"].dtype, device=tokens["A"].device)
        return out | {"scale": scale}


def check(folder, tolerance):
    """Compares with recorded results; true where they agree."""
    from safetensors.torch import load_file

    condition = load_file(folder / "condition.safetensors")["condition"]
    with torch.inference_mode():
        got = Generator.load(folder, torch.float32)(condition)
    expected, wrong = load_file(folder / "expected.safetensors"), []
    meta = folder / "meta.json"
    keys = json.loads(meta.read_text())["returned_key_order"] if meta.exists() else list(expected)
    if list(got) != keys if meta.exists() else set(got) != set(keys):
        wrong.append("other keys, or in another order")
    wrong += [f"{k} has the shape {list(v.shape)}" for k, v in expected.items() if k in got and got[k].shape != v.shape]
    error = math.nan
    if not wrong:
        error = max((got[k] - v.float()).abs().max().item() for k, v in expected.items())
        # NaN is not small either.
        wrong += [] if error <= tolerance else [f"the largest error is above {tolerance:.0e}"]
    print(f"{folder.name}: largest error {error:.1e}", *wrong, sep="; ")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--golden", nargs="+", type=pathlib.Path, required=True, metavar="DIR", help="folders with recorded results")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="of the largest error (%(default)s)")
    args = parser.parse_args()
    folders = [f.parent for root in args.golden for f in sorted([root / "config.json", *root.glob("*/config.json")]) if f.exists()]
    if not folders:
        parser.error("there is no config.json")
    # All are compared, whatever comes first.
    sys.exit(not all([check(folder, args.tolerance) for folder in folders]))


if __name__ == "__main__":
    main()
