#!/usr/bin/env python3
"""What a call of decode with given outputs costs the host, on a GPU: the time until it returns, µs.

    pip install ./python torch
    python benches/gpu/host_cost.py --csv OUT.csv

One sequence of 16/32 heads of 128, bf16, f32 states. Subjects take turns; a figure is the median over turns of the mean of some calls,
which wait for the GPU before and after, not between: few enough that the queue of launches never fills. "check" is what is read and checked
without a launch, "kernel" a launch of PyTorch's for comparison.
"""

import argparse
import contextlib
import csv
import datetime
import statistics
import time

import torch

import gdn

HEADS = (16, 32, 128, 128)
CALLS, TURNS = 200, 41


def sample(packed: bool):
    hk, hv, dk, dv = HEADS
    c = 2 * hk * dk + hv * dv

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(shape, device="cuda").to(dtype)

    weights = (
        normal(c, 4),
        None,
        normal(hv, dtype=torch.float32),
        normal(hv, dtype=torch.float32),
        normal(dv),
    )
    if packed:
        projections = normal(1, c + hv * dv), normal(1, 2 * hv)
    else:
        projections = normal(1, c), normal(1, hv, dv), normal(1, hv), normal(1, hv)
    states = normal(4, c, 3), normal(4, hv, dv, dk, dtype=torch.float32)
    names = ("conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")
    layer = gdn.Layer(HEADS, **dict(zip(names, weights, strict=True)))
    options = dict(
        state_indices=torch.tensor([2], dtype=torch.int32, device="cuda"),
        out=normal(1, hv, dv),
    )
    return layer, projections, weights, states, options


def checked(layer, weights, projections, states, options):
    """The arguments of `layer.decode`, as the function below it takes them, for a check alone."""
    others = 1, options["state_indices"], -1, None, None, False, None, None, None
    return (
        layer._checked(),
        projections,
        *states,
        *others,
        options["out"],
        True,
    )


def decode(layer, projections, states, options):
    """The call as it is written in an engine."""
    conv_state, recurrent_state = states
    state_indices, out = options["state_indices"], options["out"]
    return lambda: layer.decode(
        projections, conv_state, recurrent_state, state_indices=state_indices, out=out
    )


def subjects():
    one = torch.zeros(1, device="cuda")
    yield "kernel", one.zero_
    for packed in (True, False):
        layer, projections, weights, states, options = sample(packed)
        how = "packed" if packed else "unpacked"
        yield f"gdn.Layer.decode, {how}", decode(layer, projections, states, options)
        op = torch.ops.gdn.decode.out if packed else torch.ops.gdn.decode.unpacked_out
        given = (*projections, *weights, *states, *HEADS)
        yield (
            f"torch.ops.gdn.decode, {how}",
            lambda op=op, given=given, options=options: op(*given, **options),
        )
        yield (
            f"check, {how}",
            lambda given=checked(layer, weights, projections, states, options): (
                gdn._gdn.decode(*given)
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="where figures go")
    arguments = parser.parse_args()
    about = [str(datetime.date.today()), torch.cuda.get_device_name(), f"torch {torch.__version__}", f"gdn {gdn.__version__}"]
    print(", ".join(about))
    rows = []
    for mode in (contextlib.nullcontext, torch.inference_mode):
        with mode():
            found = dict(subjects())
            times = {name: [] for name in found}
            for call in found.values():
                for _ in range(50):
                    call()
            for _ in range(TURNS):
                for name, call in found.items():
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()
                    times[name].append((time.perf_counter() - start) / CALLS * 1e6)
                    torch.cuda.synchronize()
        for name, each in times.items():
            print(f"{mode.__name__:14} {name:32} {statistics.median(each):6.2f} ({min(each):.2f})")
            rows.append(["inference" if mode is torch.inference_mode else "default", name, f"{statistics.median(each):.2f}", f"{min(each):.2f}"])
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"# {', '.join(about)}, us"])
            writer.writerow(["mode", "subject", "median", "least"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
