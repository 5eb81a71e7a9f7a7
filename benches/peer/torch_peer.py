"""PyTorch's side of the comparisons: the same cases as `cargo run --release -p hywu-benches --bin cases`, timed by the same rules.

    torch_peer.py [--device cpu] [--threads 2]
    torch_peer.py --device cuda [--only PREFIX] [--quick] [--no-compile]

Prints one JSON object: PyTorch's version, threads, parameters of the backbone, and {case: median milliseconds}, a case a line
as soon as it is timed. On CUDA everything is bf16, the optimiser's weights are f32, and where there is more than one way to
run a case (eager, torch.compile, attention's backends) the fastest counts; all are in the details. Two cases more than the other
side has, `ceiling/..`, measure what the card can do. Used by compare_cpu.py and compare_gpu.py.
"""

import json
import signal
import sys

import torch
import torch.nn.functional as F
import torch_attention
import torch_generator_cases
import torch_low_rank
from torch import nn
from torch_mini import COEFFICIENTS, EPS, FEATURES, HIDDEN, Mini, local_filter, modulated, patchify
from torch_timing import ARGS, CUDA, DEVICE, DTYPE, fastest, measure, randn, ways


PROJECTIONS = ["qkv_proj", "o_proj", "gate_and_up_proj", "down_proj"]


def pair(linear, batch, rank):
    """Random adapters of one projection."""
    inner, outer = linear.in_features, linear.out_features
    return randn(batch, rank, inner, scale=inner**-0.5), randn(batch, outer, rank, scale=0.1), 1.0


def mini(batch, size, lora=False, train=False):
    model = Mini().to(DEVICE).computing_in(DTYPE)
    t, ids = torch.rand(batch, device=DEVICE), torch.randint(1000, (batch, model.text_len), device=DEVICE)
    pictures = lambda: tuple(randn(batch, size, size, c, dtype=torch.float32) for c in (3, 3, 2, 3))
    if not train:
        loras = None
        if lora:
            loras = [{name: pair(getattr(block, name), batch, 8) for name in PROJECTIONS} for block in model.layers]
        # Called once before it is compiled, so that the tables of rotary turns are known.
        model(*(p for p in pictures()[:3]), t, ids, loras)
        call = lambda f: lambda x_t, source, position, target: f(x_t, source, position, t, ids, loras)
        calls = {name: call(f) for name, f in ways(model, compiled=True).items()}
        return fastest(pictures, calls, seconds=2.0)
    weights = list(model.parameters())
    # In mixed precision the optimiser has weights of its own, in f32.
    master = [nn.Parameter(w.detach().float()) for w in weights] if CUDA else weights
    # Only matrices decay.
    groups = [
        {"params": [p for p in master if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in master if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, 1e-3, (0.9, 0.95), fused=True)

    def step(f):
        def run(x_t, source, position, target):
            for w in weights:
                w.grad = None
            f(x_t, source, position, target).backward()
            if CUDA:
                used = [(w, m) for w, m in zip(weights, master) if w.grad is not None]
                for w, m in used:
                    m.grad = torch.empty_like(m) if m.grad is None else m.grad
                torch._foreach_copy_([m.grad for _, m in used], [w.grad for w, _ in used])
            nn.utils.clip_grad_norm_(master, 1.0)
            optimiser.step()
            if CUDA:
                with torch.no_grad():
                    torch._foreach_copy_(weights, master)

        return run

    loss = lambda x_t, source, position, target: F.mse_loss(model(x_t, source, position, t, ids), target)
    loss(*pictures())
    calls = {name: step(f) for name, f in ways(loss, compiled=True).items()}
    return fastest(pictures, calls, seconds=4.0, grad=True)


def backward_of(forward):
    """Forward and backward: gradients of all inputs but the last, which is the output's."""

    def run(*inputs):
        *leaves, grad = inputs
        y = forward(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        return y.detach(), *torch.autograd.grad(y, wanted, grad)

    return run


def memory(b, t, c):
    """The ops that memory bounds: {name: (make, forward pass, backward too, compiled too)}."""
    x, row, per_batch = lambda: randn(b, t, c), lambda: randn(c), lambda: randn(b, 1, c)
    leaf = lambda y: y.requires_grad_()
    norm = lambda x, w, scale, shift: modulated(F.rms_norm(x, (c,), w, EPS), scale, shift)
    norm_inputs = lambda: (x(), row(), per_batch(), per_batch())

    def swiglu(y):
        up, gate = y.chunk(2, -1)
        return up * F.silu(gate)

    cases = {
        "elementwise/add": (lambda: (x(), x()), torch.add, False, False),
        "elementwise/scale": (lambda: (x(),), lambda y: y * 0.75, False, False),
        "elementwise/gated_residual": (lambda: (x(), x(), per_batch()), lambda u, v, g: torch.addcmul(u, v, g), False, True),
        "elementwise/add_row": (lambda: (x(), row()), torch.add, False, False),
        "elementwise/add_row fwd+bwd": (lambda: (x(), leaf(row()), x()), torch.add, True, False),
        "elementwise/cast to f32": (lambda: (x(),), lambda y: y.float(), False, False),
        "loss/weighted_mse": (lambda: (x(), x()), F.mse_loss, False, True),
        "rms_norm/modulated fwd": (norm_inputs, norm, False, True),
        "rms_norm/modulated fwd+bwd": (lambda: (*map(leaf, norm_inputs()), x()), norm, True, True),
        "swiglu/fwd": (lambda: (randn(b, t, 2 * c),), swiglu, False, True),
        "swiglu/fwd+bwd": (lambda: (leaf(randn(b, t, 2 * c)), x()), swiglu, True, True),
        "swiglu/silu": (lambda: (x(),), F.silu, False, False),
    }
    return {f"{name} b{b} t{t} c{c}": case for name, case in cases.items()}


def gathers():
    b, side = (1, 64) if ARGS.quick else (16, 1024)
    entries, width, count = (512, 64, 1024) if ARGS.quick else (49408, 1024, 65536)
    ids = torch.arange(count, device=DEVICE) * 2654435761 % entries
    batch, n, p2 = (1, 64, 64) if ARGS.quick else (16, 1024, 64)
    patches = batch * n
    filter_inputs = lambda: (randn(patches, COEFFICIENTS), randn(patches, p2, FEATURES), randn(patches, p2, HIDDEN))
    return {
        f"patchify/b{b} {side}px p8": (lambda: (randn(b, side, side, 3),), lambda x: patchify(x, 8), False, False),
        f"embedding/n{entries} c{width} ids{count}": (lambda: (randn(entries, width),), lambda t: F.embedding(ids, t), False, False),
        f"local_filter/fwd b{batch} t{n}": (filter_inputs, local_filter, False, True),
    }


def op(make, forward, grad, compiled):
    """Times one of the above."""
    calls = ways(forward, compiled)
    return fastest(make, {name: backward_of(f) if grad else f for name, f in calls.items()}, grad=grad)


def optimiser(count):
    """Norm, clipping, AdamW and the average; gradients are f32, as AdamW wants them."""
    side = round((count / 16) ** 0.5)
    params = [nn.Parameter(randn(side, side, scale=0.02, dtype=torch.float32)) for _ in range(16)]
    average = [p.detach().clone() for p in params]
    for p in params:
        p.grad = randn(side, side, dtype=torch.float32)
    adamw = torch.optim.AdamW(params, 1e-3, (0.9, 0.95), weight_decay=0.01, fused=True)

    def step():
        nn.utils.clip_grad_norm_(params, 1.0)
        adamw.step()
        torch._foreach_lerp_(average, [p.detach() for p in params], 0.001)

    return measure(lambda: (), step, rotate=False)


def copy_ceiling():
    count = 2**20 if ARGS.quick else 2**30
    make = lambda: (torch.randint(256, (2, count), dtype=torch.uint8, device=DEVICE).unbind(),)
    return measure(make, lambda pair: pair[0].copy_(pair[1])) | {"bytes": 2 * count, "flops": 0}


def matmul_ceiling():
    n = 256 if ARGS.quick else 8192
    return measure(lambda: (randn(n, n), randn(n, n)), torch.matmul) | {"bytes": 6 * n * n, "flops": 2 * n**3}


def cases():
    """{name: function that times it}."""
    out = {}
    if CUDA:
        out |= {"ceiling/copy": copy_ceiling, "ceiling/matmul": matmul_ceiling}
    out |= torch_low_rank.cases()
    out |= torch_attention.cases()
    out |= torch_generator_cases.cases()
    if ARGS.quick:
        out["backbone/forward b1 64px r8"] = lambda: mini(1, 64, lora=True)
        out["backbone/train step b1 64px"] = lambda: mini(1, 64, train=True)
    else:
        out["backbone/forward b32 64px"] = lambda: mini(32, 64)
        out["backbone/forward b32 64px r8"] = lambda: mini(32, 64, lora=True)
        out["backbone/forward b8 128px"] = lambda: mini(8, 128)
        out["backbone/train step b32 64px"] = lambda: mini(32, 64, train=True)
    if not CUDA:
        return out
    for name, (make, call, grad, compiled) in (memory(*((2, 16, 256) if ARGS.quick else (16, 1024, 2048))) | gathers()).items():
        out[name] = lambda case=(make, call, grad, compiled): op(*case)
    count = 2**16 if ARGS.quick else 2**24
    out[f"optim/step with average n{count}"] = lambda: optimiser(count)
    return out


def run_all(details, failures):
    """Times the wanted cases, and prints each as soon as it is done."""
    every = cases()
    once = torch_low_rank.WIDE | torch_attention.WIDE | torch_generator_cases.ONCE
    for name, run in every.items():
        if not name.startswith(tuple(ARGS.only.split(","))) or ARGS.few and name in once:
            continue
        try:
            detail = run()
        except Exception as e:  # noqa: BLE001: one case must not lose the others.
            failures[name] = f"{type(e).__name__}: {e}"[:500]
            print(f"{name}: {failures[name]}", file=sys.stderr)
            continue
        print("," if details else "", f'\n  {json.dumps(name)}: {detail["ms"]:.6f}', sep="", end="", flush=True)
        details[name] = detail
        if CUDA:
            # What the case has used stays with this process until the next one begins.
            free, total = torch.cuda.mem_get_info()
            detail["device_memory"] = total - free
            # Else what is compiled for many shapes falls back to eager after the eighth.
            torch.compiler.reset()
            torch.cuda.empty_cache()


def main():
    torch.set_num_threads(ARGS.threads)
    torch.manual_seed(0)
    parameters = sum(p.numel() for p in Mini().parameters())
    head = {"torch": torch.__version__, "device": DEVICE, "threads": ARGS.threads, "parameters": parameters}
    print(json.dumps(head)[:-1] + ', "ms": {', end="", flush=True)
    details, failures = {}, {}
    # Whoever ends this gets what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_all(details, failures)
    except KeyboardInterrupt:
        pass
    print(f'\n}}, "details": {json.dumps(details)}, "failures": {json.dumps(failures)}}}')


if __name__ == "__main__":
    main()
