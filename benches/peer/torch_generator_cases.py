"""The parameter generator in PyTorch (torch_generator.py): the cases of benches/src/cases/generator.rs, under the same names.

Weights are random, made where they are used. The blocks, which are all alike, are compiled once, and the faster of that and eager
counts: for the published size, which a bar depends on, and with --all for the smaller ones, which are eager otherwise.
"""

import dataclasses

import torch
from torch_generator import DEFAULT_MAPPING, Config, Generator
from torch_timing import ARGS, CUDA, DEVICE, DTYPE, fastest, randn, ways

TINY = Config(
    num_base_model_layers=3,
    rank=8,
    alpha=16,
    token_dim=64,
    output_dim=64,
    d_model=128,
    head_dim=64,
    num_pg_layers=2,
    input_dim=96,
    pg_mapping={
        "attention": {"lora_A_dim": 256, "lora_B_dim": 200},
        "experts": {
            "type": "grouped",
            "num_experts": 5,
            "sub_weights": {"up": {"lora_A_dim": 256, "lora_B_dim": 100}, "down": {"lora_A_dim": 100, "lora_B_dim": 256}},
        },
    },
)
# Too long to be repeated in each round on a device.
ONCE = set()


def scaled(width, blocks, experts):
    """Width, blocks and experts of a smaller size: as `GeneratorConfig::scaled`."""
    mapping = DEFAULT_MAPPING | {"mlp.experts": DEFAULT_MAPPING["mlp.experts"] | {"num_experts": experts}}
    return Config(d_model=width, input_dim=width, num_pg_layers=blocks, pg_mapping=mapping)


def passes():
    """(name, config, tokens of condition, does a bar depend on it) of each case."""
    if ARGS.quick:
        return [("tiny", TINY, 33, True)]
    smallest = ("1-64", scaled(1024, 24, 15), 1000, False)
    if not CUDA:
        return [smallest]
    quarter = dataclasses.replace(Config(), num_pg_layers=6)
    return [("full", Config(), 4000, True), ("1-4", quarter, 4000, False), ("1-16", scaled(2048, 12, 31), 2000, False), smallest]


def run_block(block, *inputs):
    return block(*inputs)


def forward(config, length, bar):
    make = lambda: (randn(1, length, config.input_dim),)
    steps, look = ways(run_block, compiled=bar or ARGS.all), {}

    def timed(config, steps):
        model = Generator.random(config, DEVICE, DTYPE)
        calls = {way: lambda condition, step=step: model(condition, step) for way, step in steps.items()}
        return fastest(make, calls, rotate=False, long=True)

    if len(steps) > 1:
        # A quarter of the blocks shows as well which way is the fastest.
        look = timed(dataclasses.replace(config, num_pg_layers=max(config.num_pg_layers // 4, 1)), steps)
        steps = {look["way"]: steps[look["way"]]}
        if CUDA:
            torch.cuda.empty_cache()
    result = timed(config, steps)
    errors = look.get("errors", {}) | result["errors"]
    return result | {"errors": errors, "looks": look.get("ways", {}), "flops": config.flops(length)}


def cases():
    """{name: function that times it}."""
    out = {}
    for name, config, length, bar in passes():
        name = f"generator/{name} L{length}"
        out[name] = lambda config=config, length=length, bar=bar: forward(config, length, bar)
        if CUDA:
            ONCE.add(name)
    return out
