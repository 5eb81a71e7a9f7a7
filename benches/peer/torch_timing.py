"""How PyTorch's cases are timed: the rules of benches/src/timing.rs. Importing this reads the command line."""

import argparse
import statistics
import time
from contextlib import nullcontext
from typing import NamedTuple

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--only", default="", help="cases whose names start so, or so: words with commas between")
parser.add_argument("--quick", action="store_true", help="few calls of small shapes: shows that everything runs")
parser.add_argument("--all", action="store_true", help="low-rank linear and attention at all shapes, and the former compiled at all of them")
parser.add_argument("--few", action="store_true", help="without the cases that are one of many or long")
parser.add_argument("--no-compile", action="store_true", help="eager only")
ARGS = parser.parse_args()
CUDA = ARGS.device == "cuda"
DEVICE = ARGS.device
DTYPE = torch.bfloat16 if CUDA else torch.float32

# Inputs and outputs of consecutive calls on a device add up to more than this (bytes): see benches/src/timing.rs.
ROTATED_BYTES, MOST_COPIES, SAMPLE_MS = 180e6, 64, 0.2
# A call that takes longer is one that a cold start makes no difference to: it needs no warm-up, and one is enough.
LONG_MS = 20e3


class Effort(NamedTuple):
    """How many calls a case gets: before the samples and samples whatever they take, each on a device and on the CPU; and a bound on
    the time of all samples on a device."""

    warm_up: tuple = (10, 3)
    ms: float = 1500.0
    least: tuple = (5, 7)


USUAL = Effort()
# For one of many; and for calls of seconds, whose calibration is their warm-up.
SHORT, LONG = Effort(warm_up=(3, 3), ms=100.0), Effort(warm_up=(0, 1), least=(3, 3))


def randn(*shape, scale=1.0, dtype=None):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype or DTYPE)


def tensors(x):
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(x, torch.Tensor):
        return [x]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (tuple, list)) else []
    return [t for value in values for t in tensors(value)]


def cpu_times(call, seconds, effort):
    """Many calls after a warm-up."""

    def timed():
        t = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - t)

    for _ in range(effort.warm_up[1]):
        ms = timed()
        if ms > LONG_MS:
            return [ms], 1
    times, start = [], time.perf_counter()
    while len(times) < effort.least[1] or (time.perf_counter() - start < seconds and len(times) < 1000):
        times.append(timed())
    return times, 1


def cuda_times(call, effort):
    """Samples of many calls between two events; nothing waits between the samples."""

    def sample(calls):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        return start, end

    def lasted(events):
        events[1].synchronize()
        return events[0].elapsed_time(events[1])

    lasted(sample(1 if ARGS.quick else effort.warm_up[0]))
    calls, number = 1, 3
    if not ARGS.quick:
        ms = lasted(sample(calls))
        while ms < SAMPLE_MS and calls < 4096:
            calls *= 2
            ms = lasted(sample(calls))
        number = min(max(int(effort.ms / ms), effort.least[0]), 100)
    events = [sample(calls) for _ in range(number)]
    return [lasted(e) / calls for e in events], calls


def measure(make, call, seconds=1.0, rotate=True, grad=False, short=False, long=False):
    """Times of call(*make()); with `rotate` as many copies of the inputs take turns on a device as it takes to leave the cache.

    One of many cases is `short`; `long` is for calls of seconds.
    """
    effort = LONG if long else SHORT if short else USUAL
    with nullcontext() if grad else torch.inference_mode() if not CUDA else torch.no_grad():
        inputs = [make()]
        if not CUDA:
            times, calls = cpu_times(lambda: call(*inputs[0]), seconds, effort)
        else:
            copies = 1
            if rotate:
                size = sum(t.nbytes for t in tensors(inputs) + tensors(call(*inputs[0])))
                copies = 2 if ARGS.quick else min(int(ROTATED_BYTES / max(size, 1)) + 1, MOST_COPIES)
            inputs += [make() for _ in range(copies - 1)]
            outputs, turn = [None] * copies, 0

            def next_call():
                nonlocal turn
                outputs[turn] = call(*inputs[turn])
                turn = (turn + 1) % copies

            times, calls = cuda_times(next_call, effort)
    times.sort()
    at = lambda part: times[round(part * (len(times) - 1))]
    return {"ms": statistics.median(times), "p10": at(0.1), "p90": at(0.9), "samples": len(times), "calls": calls}


def ways(call, compiled=False, **more):
    """The ways to run a case on a device: eager, compiled where asked for, and others."""
    known = {"eager": call}
    if CUDA and compiled and not ARGS.no_compile:
        known["compiled"] = torch.compile(call, dynamic=False)
    return known | (more if CUDA else {})


def fastest(make, calls, **options):
    """Times of the fastest way, with all of them beside it. A way that fails leaves the others."""
    results, errors = {}, {}
    for name, call in calls.items():
        try:
            results[name] = measure(make, call, **options)
        except Exception as e:  # noqa: BLE001: whatever it is, the next way may work.
            errors[name] = f"{type(e).__name__}: {e}"[:500]
    if not results:
        raise RuntimeError("; ".join(f"{name}: {e}" for name, e in errors.items()))
    best = min(results, key=lambda name: results[name]["ms"])
    return results[best] | {"way": best, "ways": {n: r["ms"] for n, r in results.items()}, "errors": errors}
