"""Holds the Triton kernel to the definition, bit for bit, and times it against a copy of the same bytes.

On a machine with an NPU (torch_npu and triton-ascend installed), or with an NVIDIA GPU:

    python -m gdn.triton_check            # the whole table, every element, on the device that is there
    python -m gdn.triton_check --time     # and then the times

Where vllm-ascend is installed, its own kernel is timed beside it. On the CPU the table runs in Triton's
interpreter: `TRITON_INTERPRET=1 python -m gdn.triton_check --device cpu`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from gdn import triton_split
from gdn.triton_split import Profile, profile_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

POISON = 0xA5


class Case(NamedTuple):
    """One layout and number of rows, moved there and back."""

    heads: tuple[int, int, int, int]
    """`num_k_heads, num_v_heads, head_k_dim, head_v_dim`"""
    packing: str
    rows: int
    sizes: tuple[int, int] = (2, 2)
    """Bytes of an element of `mixed_qkvz` and `mixed_ba`."""
    apart: int = 0
    """Elements between the end of a row and the next, in every tensor."""
    buffer_bytes: int = 85 * 1024
    cores: int = 4
    max_rows_per_iter: int = 64

    def __str__(self) -> str:
        hk, hv, dk, dv = self.heads
        size, ba_size = self.sizes
        rows = f"{self.rows} rows {self.apart} apart of {size}- and {ba_size}-byte elements"
        return f"{hk}/{hv}x{dk}+{dv} {self.packing}, {rows}, {self.cores} cores, buffer {self.buffer_bytes}"

    def tails(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of one row of the six tensors, in the order of `triton_split.NAMES`."""
        hk, hv, dk, dv = self.heads
        return (2 * hk * dk + 2 * hv * dv,), (2 * hv,), (2 * hk * dk + hv * dv,), (hv, dv), (hv,), (hv,)


def conformance() -> list[Case]:
    """The table: both packings of every ratio, dim, element size, stride and number of rows that matters."""
    two: list[tuple] = [
        # the models: Qwen3-Next-80B-A3B, a quarter of it, Qwen3.6-27B
        ((16, 32, 128, 128), 3),
        ((4, 8, 128, 128), 21),
        ((16, 48, 128, 128), 3),
        # ratios 1 to 8, dims that are no powers of two, that differ, that are odd
        ((4, 4, 16, 16), 1),
        ((4, 4, 16, 16), 130),
        ((3, 9, 24, 40), 33),
        ((2, 8, 96, 96), 9),
        ((5, 25, 7, 3), 17),
        ((7, 42, 8, 16), 5),
        ((1, 7, 32, 8), 10),
        ((2, 16, 1, 1), 70),
        ((1, 1, 1, 1), 300),
        ((64, 64, 4, 8), 6),
        # no rows
        ((4, 8, 16, 16), 0),
        # rows apart, element sizes
        ((3, 6, 24, 40), 11, (2, 2), 13),
        ((4, 8, 32, 32), 9, (2, 4), 8),
        ((4, 8, 32, 32), 9, (1, 2), 5),
        ((4, 12, 16, 16), 9, (4, 4), 1),
        ((4, 8, 16, 16), 9, (8, 8), 3),
        # rows larger than the buffer: some heads at a time, then parts of a head
        ((16, 32, 64, 64), 3, (4, 4), 0, 40_000),
        ((6, 18, 16, 8), 5, (2, 2), 2, 1_000),
        ((2, 6, 24, 41), 4, (2, 2), 3, 500),
        # many rows, and more than 65,536
        ((1, 2, 4, 4), 65_537, (2, 2), 0, 1 << 22, 3, 1 << 13),
        ((1, 1, 2, 2), 70_001, (1, 1), 1, 1 << 22, 5, 1 << 13),
        # more elements than 32 bits count: rows 2^30 apart
        ((2, 4, 8, 8), 4, (1, 1), 1 << 30),
    ]
    return [Case(case[0], packing, *case[1:]) for case in two for packing in triton_split.PACKINGS]


def packed_features(case: Case) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The definition: the tensor that each feature of a packed row goes to, and its place there.

    Returns those of `mixed_qkvz` and of `mixed_ba`, in the order of the packed row.
    """
    hk, hv, dk, dv = case.heads
    r = hv // hk
    qkvz, ba = [], []
    if case.packing == "interleaved":
        for head in range(hk):
            qkvz += [("mixed_qkv", head * dk + i) for i in range(dk)]
            qkvz += [("mixed_qkv", hk * dk + head * dk + i) for i in range(dk)]
            qkvz += [("mixed_qkv", 2 * hk * dk + head * r * dv + i) for i in range(r * dv)]
            qkvz += [("z", head * r * dv + i) for i in range(r * dv)]
            ba += [("b", head * r + i) for i in range(r)]
            ba += [("a", head * r + i) for i in range(r)]
    else:
        qkvz += [("mixed_qkv", i) for i in range(2 * hk * dk + hv * dv)]
        qkvz += [("z", i) for i in range(hv * dv)]
        ba += [("b", i) for i in range(hv)]
        ba += [("a", i) for i in range(hv)]
    return qkvz, ba


def _empty(case: Case, name: str, device: str) -> torch.Tensor:
    """A poisoned tensor of the case, its rows apart."""
    import torch

    index = triton_split.NAMES.index(name)
    dtype = getattr(torch, triton_split.WORDS[case.sizes[name in ("mixed_ba", "b", "a")]])
    tail = case.tails()[index]
    features = tail[0] * (tail[1] if len(tail) == 2 else 1)
    stride = features + case.apart
    whole = torch.empty(max(case.rows, 1) * stride, dtype=dtype, device=device)
    if case.apart < 1 << 20:
        whole.view(torch.uint8).fill_(POISON)
    strides = (stride, *((tail[1], 1) if len(tail) == 2 else (1,)))
    rows = whole.as_strided((case.rows, *tail), strides)
    if case.apart >= 1 << 20:  # too much memory to touch all of it
        rows.fill_(_poison(dtype))
    return rows


def _poison(dtype: torch.dtype) -> int:
    return int.from_bytes(bytes([POISON]) * dtype.itemsize, "little", signed=True)


def _random(rows: torch.Tensor) -> None:
    """Random bits in every element of the rows, none of them poison."""
    import torch

    info = torch.iinfo(rows.dtype)
    bits = torch.randint(info.min // 2, info.max // 2, rows.shape, dtype=torch.int64).to(rows.dtype)
    poison = _poison(rows.dtype)
    rows.copy_(torch.where(bits == poison, bits + 1, bits).to(rows.device))


def _untouched(rows: torch.Tensor, apart: int) -> bool:
    """Whether what lies between the rows is still poison."""
    if not 0 < apart < 1 << 20 or not rows.shape[0]:
        return True
    features = rows[0].numel()
    gaps = rows.as_strided((rows.shape[0], apart), (rows.stride(0), 1), rows.storage_offset() + features)
    return bool((gaps == _poison(rows.dtype)).all())


def run_case(case: Case, device: str, profile: Profile) -> None:
    """Splits poisoned outputs full and merges them back, and compares every element with the definition.

    Raises:
        AssertionError: something is not what the definition says; the message has the case and the tensor.
    """
    import torch

    given = {name: _empty(case, name, device) for name in ("mixed_qkvz", "mixed_ba")}
    for rows in given.values():
        _random(rows)
    out = {name: _empty(case, name, device) for name in ("mixed_qkv", "z", "b", "a")}
    triton_split.split(*given.values(), *case.heads, case.packing, tuple(out.values()), profile=profile)
    for rows, features in zip(given.values(), packed_features(case)):
        for name in dict.fromkeys(name for name, _ in features):
            places = [(i, at) for i, (of, at) in enumerate(features) if of == name]
            source, target = (torch.tensor(list(index), device=device) for index in zip(*places))
            wanted = torch.empty(case.rows, len(places), dtype=rows.dtype, device=device)
            wanted[:, target] = rows[:, source]
            assert torch.equal(out[name].reshape(case.rows, len(places)), wanted), (
                f"{name} is wrong: split of {case}"
            )
            assert _untouched(out[name], case.apart), (
                f"what lies between the rows of {name} was written: split of {case}"
            )
    back = {name: _empty(case, name, device) for name in given}
    triton_split.merge(*out.values(), *case.heads, case.packing, tuple(back.values()), profile=profile)
    for name, rows in back.items():
        assert torch.equal(rows, given[name]), f"{name} is wrong: merge of {case}"
        assert _untouched(rows, case.apart), (
            f"what lies between the rows of {name} was written: merge of {case}"
        )


def check(device: str, profile: Profile) -> int:
    """The whole table on a device, with the table's own cores and buffers and with those of `profile`.

    Returns how many cases there were.
    """
    table = conformance()
    for case in table:
        own = profile._replace(
            cores=case.cores, buffer_bytes=case.buffer_bytes, max_rows_per_iter=case.max_rows_per_iter
        )
        run_case(case, device, own)
        if device != "cpu":
            run_case(case, device, profile)
    return len(table)


def timed(run: Callable[[], object], device: str, seconds: float) -> float:
    """Microseconds of one call of `run`, in a queue of them: the median over rounds."""
    import torch

    module = getattr(torch, device.split(":")[0])
    calls, took = 4, []
    run()
    module.synchronize()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(took) < 5:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        module.synchronize()
        once = (time.perf_counter() - start) / calls
        took.append(once * 1e6)
        if once * calls < 0.002:
            calls, took = calls * 2, []
    return statistics.median(took)


def vllm_ascend_split() -> Callable[..., object] | None:
    """vllm-ascend's own function, where it is installed."""
    if importlib.util.find_spec("vllm_ascend") is None:
        return None
    from vllm_ascend.ops.triton.fla.fused_qkvzba_split_reshape import fused_qkvzba_split_reshape_cat
    from vllm_ascend.ops.triton.triton_utils import init_device_properties_triton

    init_device_properties_triton()
    return fused_qkvzba_split_reshape_cat


def time_against_copy(device: str, seconds: float) -> None:
    """Prints microseconds of the split, of a copy of the same bytes and, if it is there, of vllm-ascend's."""
    import torch

    peer = vllm_ascend_split() if device.startswith("npu") else None

    def at(tokens: int) -> list[float]:
        case = Case((16, 32, 128, 128), "interleaved", tokens)
        tensors = {name: _empty(case, name, device) for name in triton_split.NAMES}
        for name in ("mixed_qkvz", "mixed_ba"):
            _random(tensors[name])
        qkvz, ba, *out = (t.view(torch.bfloat16) for t in tensors.values())
        source = torch.empty(qkvz.numel() + ba.numel(), dtype=qkvz.dtype, device=device)
        target = torch.empty_like(source)
        ours = timed(lambda: triton_split.split(qkvz, ba, *case.heads, case.packing, out), device, seconds)
        took = [ours, timed(lambda: target.copy_(source), device, seconds)]
        return took + ([timed(lambda: peer(qkvz, ba, *case.heads), device, seconds)] if peer else [])

    print("\nheads 16/32 of 128, bf16, interleaved: microseconds of a call, outputs given")
    print(f"{'tokens':>8} {'gdn':>10} {'copy':>10} {'ratio':>7} {'vllm-ascend' if peer else '':>12}")
    for tokens in (1, 16, 64, 256, 1024, 4096, 16384):
        ours, copy, *other = at(tokens)
        print(
            f"{tokens:8} {ours:10.2f} {copy:10.2f} {ours / copy:7.2f} "
            + "".join(f"{us:12.2f}" for us in other)
        )


def default_device() -> str:
    """`npu`, `cuda` or `cpu`, the first that is there."""
    import torch

    if importlib.util.find_spec("torch_npu") is not None:
        import torch_npu  # noqa: F401

        return "npu:0"
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gdn.triton_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", help="npu:0, cuda:0 or cpu; by default the first that is there")
    parser.add_argument("--time", action="store_true", help="time it too")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    args = parser.parse_args(arguments)
    device = args.device or default_device()
    kind, _, index = device.partition(":")
    profile = profile_of(kind, int(index or 0))
    started = time.perf_counter()
    print(f"{device}: {profile}")
    cases = check(device, profile)
    took = time.perf_counter() - started
    print(f"{cases} cases, there and back: every element is right ({took:.0f} s, compiling included)")
    if args.time and kind != "cpu":
        time_against_copy(device, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
