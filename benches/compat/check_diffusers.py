"""Adapters of this project in diffusers, and diffusers' here: its own format on a small SD3 transformer, kohya's on a small UNet."""

import tempfile
from pathlib import Path

import torch
from common import check, differs, finish, hywu, merged, random_adapter, randomise, refused, same
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
dir = Path(tempfile.mkdtemp())
WEIGHTS = "diffusion_pytorch_model.safetensors"


def transformer():
    torch.manual_seed(1)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=8,
    ).eval()


def unet():
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


MODELS = {
    "transformer": (transformer, dict(hidden_states=torch.randn(2, 4, 8, 8), encoder_hidden_states=torch.randn(2, 5, 16),
                                      pooled_projections=torch.randn(2, 24), timestep=torch.tensor([3, 500]))),
    "unet": (unet, dict(sample=torch.randn(2, 4, 8, 8), timestep=7, encoder_hidden_states=torch.randn(2, 5, 12))),
}


def run(kind, model):
    with torch.no_grad():
        return model.eval()(**MODELS[kind][1]).sample


def linears(model, part):
    """Modules of attention: name -> (in, out)."""
    return {n: (m.in_features, m.out_features) for n, m in model.named_modules() if part in n and isinstance(m, torch.nn.Linear)}


for kind, (make, _) in MODELS.items():
    make().save_pretrained(dir / kind)


def merge(kind, adapter, name):
    hywu("merge", adapter, "--base", dir / kind / WEIGHTS, "--output", dir / name)
    return run(kind, merged(MODELS[kind][0](), dir / name))


def update(kind, adapter):
    """The output with W + scale B A by the formula of the format."""
    model, tensors = MODELS[kind][0](), load_file(adapter)
    for name, module in model.named_modules():
        if f"{name}.lora_A" in tensors:
            a, b = (tensors[f"{name}.lora_{side}"][0].double() for side in "AB")
            module.weight.data = (module.weight.double() + tensors["scale"].double() * (b @ a)).float()
    return run(kind, model)


# Ours there, in diffusers' format: the scale is in the metadata, or folded.
plain = run("transformer", transformer())
for case, scale, ranks in [("one rank", 2.0, [4]), ("many ranks", 0.7, [1, 2, 4, 5])]:
    modules = linears(transformer(), "attn.")
    dims = {name: (*d, ranks[i % len(ranks)]) for i, (name, d) in enumerate(modules.items())}
    ours = dir / f"{case}.safetensors"
    random_adapter(ours, dims, scale)
    expected = update("transformer", ours)
    differs(case, expected, plain)
    check(f"{case}, merged here", merge("transformer", ours, f"{case} merged"), expected)
    for folding, args in [("scale in the metadata", []), ("scale folded", ["--fold-scale"])]:
        file = dir / f"{case} {folding}.safetensors"
        hywu("export", ours, "--format", "diffusers", "--output", file, *args)
        if args:
            save_file(load_file(file), file)  # A reader that knows no metadata.
        model = transformer()
        # With a file's whole path alone it does not look into the metadata.
        model.load_lora_adapter(dir, prefix="transformer", weight_name=file.name)
        check(f"{case}, {folding}, in diffusers", run("transformer", model), expected)
        # What a pipeline does with the file.
        state, metadata = StableDiffusion3Pipeline.lora_state_dict(file, return_lora_metadata=True)
        model = transformer()
        StableDiffusion3Pipeline.load_lora_into_transformer(state, model, metadata=metadata)
        check(f"{case}, {folding}, through a pipeline", run("transformer", model), expected)
    back = dir / f"{case} back.safetensors"
    hywu("import", dir / f"{case} scale in the metadata.safetensors", "--output", back)
    same(f"{case}, there and back", ours, back)

# Theirs here.
CONFIGS = {
    "plain": dict(r=4, lora_alpha=6),
    "patterns": dict(r=4, lora_alpha=6, rank_pattern={"to_q": 2}, alpha_pattern={"transformer_blocks.1.attn.to_k": 9}),
    "rsLoRA": dict(r=5, lora_alpha=6, use_rslora=True),
}
for case, config in CONFIGS.items():
    model = transformer()
    model.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **config))
    randomise(model)
    expected = run("transformer", model)
    differs(f"diffusers' {case}", expected, plain)
    # Of a pipeline, behind `transformer.`, and of the model alone, without.
    StableDiffusion3Pipeline.save_lora_weights(
        dir / f"theirs {case}", transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    model.save_lora_adapter(dir / f"theirs {case}", weight_name="alone.safetensors")
    for file in ("pytorch_lora_weights", "alone"):
        hywu("import", dir / f"theirs {case}" / f"{file}.safetensors", "--output", dir / "theirs.safetensors")
        check(f"diffusers' {case}, {file}, imported and merged here", merge("transformer", dir / "theirs.safetensors", f"{case} {file}"), expected)
model = transformer()
model.add_adapter(LoraConfig(target_modules=["to_q"], use_dora=True))
model.save_lora_adapter(dir / "dora")
refused("use_dora", "import", dir / "dora" / "pytorch_lora_weights.safetensors", "--output", dir / "never.safetensors")

# kohya's format: ours in diffusers, which resolves the flattened names with heuristics of its own.
plain = run("unet", unet())
modules = {n: d for n, d in linears(unet(), ".attn").items()}
ours, file = dir / "unet.safetensors", dir / "kohya.safetensors"
random_adapter(ours, {name: (*d, 4) for name, d in modules.items()}, 1.5)
expected = update("unet", ours)
differs("kohya", expected, plain)
hywu("export", ours, "--format", "kohya", "--output", file)
state, alphas = StableDiffusionPipeline.lora_state_dict(file)
model = unet()
StableDiffusionPipeline.load_lora_into_unet(state, alphas, model)
check("ours as kohya's, in diffusers", run("unet", model), expected)
hywu("import", file, "--base", dir / "unet" / WEIGHTS, "--output", dir / "back.safetensors")
same("kohya's, there and back", ours, dir / "back.safetensors")
# And a file that diffusers wrote in kohya's format, with alpha as a whole number.
model = unet()
model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
randomise(model)
state = convert_state_dict_to_kohya(get_peft_model_state_dict(model))
state = {f"lora_unet_{k.removeprefix('lora_unet_')}": v.contiguous() for k, v in state.items()}
save_file(state, file)
hywu("import", file, "--base", dir / "unet" / WEIGHTS, "--output", dir / "theirs.safetensors")
check("kohya's by diffusers, imported and merged here", merge("unet", dir / "theirs.safetensors", "kohya merged"), run("unet", model))

finish()
