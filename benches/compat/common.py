"""What the checks share: the program, adapters in its own format, and how results are told."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HYWU = os.environ.get("HYWU", str(Path(__file__).parents[2] / "target/release/hywu"))
# Largest difference of outputs, of the largest output: f32 sums in another order.
TOLERANCE = 1e-5

failures = 0


def hywu(*args):
    """Runs `hywu adapter ..`; its text on standard error."""
    done = subprocess.run([HYWU, "adapter", *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"hywu adapter {' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stderr


def check(what, ours, theirs):
    """Two outputs must agree."""
    global failures
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    good = error <= TOLERANCE
    failures += not good
    print(f"{'ok   ' if good else 'WRONG'} {what}: {error:.1e}", flush=True)


def differs(what, one, other):
    """Two outputs must not agree: an adapter that does nothing would pass every other check."""
    global failures
    change = ((one - other).abs().max() / other.abs().max()).item()
    good = change > 1e-2
    failures += not good
    print(f"{'ok   ' if good else 'WRONG'} {what}: changes the output by {change:.2f}", flush=True)


def same(what, one, other):
    """Two files must hold the same bits."""
    global failures
    one, other = load_file(one), load_file(other)
    good = one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    failures += not good
    print(f"{'ok   ' if good else 'WRONG'} {what}: bit for bit", flush=True)


def refused(what, *args):
    """The program must not take it, and name it."""
    global failures
    done = subprocess.run([HYWU, "adapter", *map(str, args)], capture_output=True, text=True)
    good = done.returncode == 1 and what in done.stderr and "panicked" not in done.stderr
    failures += not good
    print(f"{'ok   ' if good else 'WRONG'} refused: {done.stderr.strip().splitlines()[-1:]}", flush=True)


def finish():
    sys.exit(f"{failures} wrong" if failures else 0)


def random_adapter(path, modules, scale, seed=0):
    """An adapter in this project's format; `modules`: name -> (in, out, rank), with experts in front of a grouped one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"scale": torch.tensor(scale)}
    for name, (*experts, inner, outer, rank) in modules.items():
        tensors[f"{name}.lora_A"] = torch.randn(1, *experts, rank, inner, generator=generator) / inner**0.5
        tensors[f"{name}.lora_B"] = torch.randn(1, *experts, outer, rank, generator=generator) / rank**0.5
    save_file(tensors, path)
    return tensors


def randomise(model, seed=1):
    """New adapters are zero on one side."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5


def merged(model, folder):
    """The same model with the weights of a merged checkpoint."""
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    model.load_state_dict(tensors)
    return model.eval()
