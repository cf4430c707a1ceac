#!/usr/bin/env python3
"""What a call from Python costs: the package against eager PyTorch, a copy of the same bytes, and the peers, in one process.

    pip install ./python torch
    python benches/python.py --csv OUT.csv                     # the CPU, and a GPU where there is one
    python benches/python.py --sglang PATH/triton_gdn_fused_proj.py

Every subject is first held bit for bit to the definition. Subjects take turns, and a figure is the median over the turns of the mean
of a turn. "Host" figures on a GPU are the time until the call returns, with the queue never full. Nothing is timed behind a red check.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import gdn

HEADS = (16, 32, 128, 128)
TURNS, TURN_SECONDS = 41, 0.01


def eager(mixed_qkvz, mixed_ba):
    """Views, split and cat: the definition, and what a model does without a fused kernel."""
    n, (hk, hv, dk, dv) = mixed_qkvz.shape[0], HEADS
    r = hv // hk
    q, k, v, z = mixed_qkvz.view(n, hk, -1).split([dk, dk, r * dv, r * dv], dim=2)
    b, a = mixed_ba.view(n, hk, -1).split([r, r], dim=2)
    mixed_qkv = torch.cat([q.reshape(n, hk * dk), k.reshape(n, hk * dk), v.reshape(n, hv * dv)], dim=1)
    return mixed_qkv, z.reshape(n, hv, dv), b.reshape(n, hv), a.reshape(n, hv)


def transformers_split() -> Callable | None:
    """What the Qwen3-Next layer of transformers does with its projections, by its own method, where it is installed."""
    try:
        from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
    except ImportError:
        return None
    hk, hv, dk, dv = HEADS
    config = Qwen3NextConfig(
        hidden_size=64,
        linear_num_key_heads=hk,
        linear_num_value_heads=hv,
        linear_key_head_dim=dk,
        linear_value_head_dim=dv,
    )
    layer = Qwen3NextGatedDeltaNet(config, 0)

    def call(mixed_qkvz, mixed_ba):
        q, k, v, z, b, a = layer.fix_query_key_value_ordering(mixed_qkvz[None], mixed_ba[None])
        q, k, v = (x.reshape(x.shape[0], x.shape[1], -1) for x in (q, k, v))
        return torch.cat((q, k, v), dim=-1)[0], z[0], b[0], a[0]

    return call


def sglang_split(path: Path) -> Callable:
    """SGLang's wrapper, from its file; what the file imports of the engine and does not need is stood in for."""
    from peers import load

    split = load(path).fused_qkvzba_split_reshape_cat
    hk, hv, dk, dv = HEADS
    return lambda qkvz, ba: split(qkvz, ba, hk, hv, dk, dv)


def check(name: str, call: Callable, qkvz, ba) -> None:
    for got, expected in zip(call(qkvz, ba), eager(qkvz, ba)):
        same = got.shape == expected.shape and got.dtype == expected.dtype
        if not (same and torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))):
            raise SystemExit(f"{name}: other bits than the definition's; nothing is timed")


def take_turns(subjects: dict[str, Callable[[], object]], sync: Callable[[], None]) -> dict[str, float]:
    """The median over the turns of microseconds a call."""
    repeats, times = {}, {name: [] for name in subjects}
    for name, call in subjects.items():
        for _ in range(3):
            call()
        sync()
        start = time.perf_counter()
        call()
        sync()
        # On a GPU the queue takes about a thousand launches before the host has to wait.
        repeats[name] = max(1, min(400, int(TURN_SECONDS / (time.perf_counter() - start))))
    for _ in range(TURNS):
        for name, call in subjects.items():
            sync()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
            sync()
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(n: int, device: str):
    generator = torch.Generator().manual_seed(n)
    hk, hv, dk, dv = HEADS
    qkvz = torch.randn(n, 2 * hk * dk + 2 * hv * dv, generator=generator).bfloat16().to(device)
    return qkvz, torch.randn(n, 2 * hv, generator=generator).bfloat16().to(device)


def measure(device: str, sizes: list[int], sglang: Path | None) -> list[dict]:
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    # Arguments are passed as a model passes them: unpacking a tuple at each call would cost 0.2 us.
    split, operator, drop_in = gdn.split, torch.ops.gdn.split, gdn.fused_qkvzba_split_reshape_cat
    hk, hv, dk, dv = HEADS
    calls = {"eager PyTorch": eager, "gdn.split": lambda qkvz, ba: split(qkvz, ba, hk, hv, dk, dv)}
    calls["torch.ops.gdn.split"] = lambda qkvz, ba: operator(qkvz, ba, hk, hv, dk, dv)
    calls["fused_qkvzba_split_reshape_cat"] = lambda qkvz, ba: drop_in(qkvz, ba, hk, hv, dk, dv)
    if (theirs := transformers_split()) is not None:
        calls["transformers' own"] = theirs
    if device == "cuda" and sglang is not None:
        calls["SGLang's wrapper"] = sglang_split(sglang)
    rows = []
    for mode in ("default", "inference"):
        for n in sizes:
            with torch.inference_mode(mode == "inference"):
                qkvz, ba = tensors(n, device)
                for name, call in calls.items():
                    if n > 0 or name.startswith(("gdn", "torch")):
                        check(name, call, qkvz, ba) if n else call(qkvz, ba)
                subjects = {
                    name: (lambda call=call: call(qkvz, ba))
                    for name, call in calls.items()
                    if n > 0 or name.startswith(("gdn", "torch"))
                }
                mixed_qkv, z, b, a = out = split(qkvz, ba, *HEADS)
                operator_out = operator.out
                subjects["gdn.split, out="] = lambda: split(qkvz, ba, hk, hv, dk, dv, out=out)
                subjects["torch.ops.gdn.split.out"] = lambda: operator_out(
                    qkvz, ba, hk, hv, dk, dv, mixed_qkv=mixed_qkv, z=z, b=b, a=a
                )
                copies = (torch.empty_like(qkvz), torch.empty_like(ba))
                subjects["copy of the same bytes, outputs given"] = lambda: (
                    copies[0].copy_(qkvz),
                    copies[1].copy_(ba),
                )
                if device == "cpu":
                    # What writing alone takes: no way to read the rows as well is faster.
                    subjects["zeros to the same outputs"] = lambda: [part.zero_() for part in out]
                for name, us in take_turns(subjects, sync).items():
                    rows.append({"device": device, "mode": mode, "num_tokens": n, "subject": name, "us": round(us, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="where the figures go")
    parser.add_argument("--sglang", type=Path, help="SGLang's triton_gdn_fused_proj.py")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only this one")
    parser.add_argument("--tokens", type=int, nargs="+", help="instead of 0 1 64 512 4096")
    arguments = parser.parse_args()
    machine = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            machine = line.split(":")[1].strip()
            break
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    header = f"{machine}, {torch.get_num_threads()} threads; {gpu}; torch {torch.__version__}, gdn {gdn.__version__}"
    print(header, "bf16, heads 16/32 of 128, microseconds a call", sep="\n")
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        if arguments.device in (None, device):
            rows += measure(device, arguments.tokens or [0, 1, 64, 512, 4096], arguments.sglang)
    sizes = sorted({row["num_tokens"] for row in rows})
    for device, mode in sorted({(row["device"], row["mode"]) for row in rows}):
        print(f"\n{device}, {mode} mode" + (", host time" if device == "cuda" else ""))
        print(f"{'':42}" + "".join(f"{'N = ' + str(n):>12}" for n in sizes))
        chosen = [row for row in rows if (row["device"], row["mode"]) == (device, mode)]
        for subject in dict.fromkeys(row["subject"] for row in chosen):
            at = {row["num_tokens"]: row["us"] for row in chosen if row["subject"] == subject}
            print(f"{subject:42}" + "".join(f"{at[n]:>12.2f}" if n in at else f"{'':>12}" for n in sizes))
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            file.write(f"# {header}\n")
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
