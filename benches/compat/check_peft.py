"""Adapters of this project in PEFT, and PEFT's here."""

import tempfile
from pathlib import Path

import peft
import torch
from common import check, differs, finish, hywu, merged, random_adapter, randomise, refused, same
from safetensors.torch import save_file
from toy import MODULES, QKV_ROWS, Toy, split_weights, updated

torch.manual_seed(0)
dir = Path(tempfile.mkdtemp())
x = torch.randn(2, 12, 32)
fused = Toy().eval()
base = {k: v.detach().clone() for k, v in fused.state_dict().items()}
save_file(base, dir / "base.safetensors")
save_file(split_weights(base), dir / "split.safetensors")
rows = ",".join(map(str, QKV_ROWS))
SPLIT = ["--layout", "split", "--qkv-rows", rows]


def toy(weights):
    split = any("q_proj" in k for k in weights)
    model = Toy(split)
    model.load_state_dict(weights)
    return model.eval()


with torch.no_grad():
    plain = fused(x)
    # Ours there: scales that are a power of two and not; one rank and many.
    for case, scale, ranks in [("one rank", 4.0, [4]), ("many ranks", 1.7, [1, 3, 4, 8])]:
        dims = {name: (*d, ranks[i % len(ranks)]) for i, (name, d) in enumerate(MODULES.items())}
        ours = dir / f"{case}.safetensors"
        adapter = random_adapter(ours, dims, scale)
        expected = toy(updated(base, adapter))(x)
        differs(case, expected, plain)
        for layout, args in [("fused", []), ("split", SPLIT)]:
            name = "base" if layout == "fused" else "split"
            folder = dir / f"{case} {layout}"
            hywu("export", ours, "--format", "peft", "--output", folder, *args)
            weights = base if layout == "fused" else split_weights(base)
            loaded = peft.PeftModel.from_pretrained(toy(weights), folder).eval()
            check(f"{case}, {layout}, in PEFT", loaded(x), expected)
            hywu("merge", ours, "--base", dir / f"{name}.safetensors", "--output", dir / f"{case} {layout} merged", *args)
            check(f"{case}, {layout}, merged here", merged(toy(weights), dir / f"{case} {layout} merged")(x), expected)
            check(f"{case}, {layout}, merged there", loaded.merge_and_unload()(x), expected)
            back = dir / f"{case} {layout} back.safetensors"
            hywu("import", folder, "--output", back, *args)
            same(f"{case}, {layout}, there and back", ours, back)

    # Theirs here.
    attention = [f"model.layers.{n}.self_attn.{p}" for n in range(2) for p in ("qkv_proj", "o_proj")]
    mlp = ["gate_and_up_proj", "down_proj"]
    configs = {
        "plain": dict(r=4, lora_alpha=6, target_modules=attention + mlp),
        "rank_pattern": dict(r=4, lora_alpha=6, target_modules=attention + mlp, rank_pattern={"o_proj": 2, r"layers\.1\.self_attn\.qkv_proj": 5}),
        "alpha_pattern": dict(r=4, lora_alpha=6, target_modules=attention + mlp, alpha_pattern={"experts.1.down_proj": 9, "^model.layers.0.self_attn.o_proj": 1}),
        "rsLoRA": dict(r=5, lora_alpha=6, target_modules=attention + mlp, use_rslora=True, rank_pattern={"down_proj": 3}, alpha_pattern={"qkv_proj": 2}),
    }
    for case, config in configs.items():
        model = peft.get_peft_model(toy(base), peft.LoraConfig(**config)).eval()
        randomise(model)
        model.save_pretrained(dir / f"theirs {case}")
        hywu("import", dir / f"theirs {case}", "--output", dir / f"theirs {case}.safetensors")
        hywu("merge", dir / f"theirs {case}.safetensors", "--base", dir / "base.safetensors", "--output", dir / f"theirs {case} merged")
        differs(f"PEFT's {case}", model(x), plain)
        check(f"PEFT's {case}, imported and merged here", merged(toy(base), dir / f"theirs {case} merged")(x), model(x))

    # What can't be had as low-rank pairs.
    config = dict(r=4, target_modules=attention)
    for name, extra in {
        "use_dora": dict(use_dora=True),
        "bias": dict(bias="all"),
        "modules_to_save": dict(modules_to_save=["down_proj"]),
        "lora_bias": dict(lora_bias=True),
        "init_lora_weights": dict(init_lora_weights="olora"),
    }.items():
        model = toy(base)
        if name in ("bias", "lora_bias"):
            for layer in model.model.layers:
                layer.self_attn.qkv_proj.bias = torch.nn.Parameter(torch.zeros(64))
                layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.zeros(32))
        peft.get_peft_model(model, peft.LoraConfig(**config, **extra)).save_pretrained(dir / name)
        refused(name, "import", dir / name, "--output", dir / "never.safetensors")

finish()
