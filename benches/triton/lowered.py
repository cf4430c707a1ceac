"""This library's Triton kernel and the seed's, both lowered by triton-ascend and run on the CPU.

    python3.11 benches/triton/lowered.py --seed PATH [--csv OUT.csv]

PATH is vllm-ascend's vllm_ascend/ops/triton/fla/fused_qkvzba_split_reshape.py. Run it with
the Python and the PYTHONPATH of `cargo xtask ascend` (docs/ascend.md). Prints, for 4096 tokens on 48 vector
cores, the copies that are issued (in and out, all cores together), the bytes of on-chip buffers a program
asks for, and its size.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / folder) for folder in ("python/ascend", "benches")]

from execution import build  # noqa: E402
from gdn import tiling, triton_split  # noqa: E402
from gdn.triton_check import Case, packed_features  # noqa: E402
from lowering import blocks_of, facts, lower, lower_case  # noqa: E402
from peers import load  # noqa: E402

CORES, TOKENS, BUFFER = 48, 4096, 85 * 1024
HEADS = [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128), (4, 12), (16, 48)]


class Seed:
    """The seed's kernel with the numbers its own wrapper gives it."""

    def __init__(self, module: object, case: Case) -> None:
        hk, hv, dk, dv = case.heads
        qkvz, ba, qkv, z, b, _ = (int(np.prod(tail)) for tail in case.tails())
        self.grid = max(1, min(case.cores, case.rows))
        self.rows_per_core = -(-case.rows // self.grid)
        fitting = max(1, BUFFER // 2 // (qkvz + ba + qkv + z + 2 * b))
        fitting = 1 << (fitting - 1).bit_length()
        self.rows_per_iter = min(fitting, self.rows_per_core, module.MAX_ROWS_PER_ITER)
        constants = {
            "NUM_HEADS_QK": hk,
            "NUM_HEADS_V": hv,
            "HEAD_QK": dk,
            "HEAD_V": dv,
            "QKVZ_ROW_STRIDE": qkvz,
            "BA_ROW_STRIDE": ba,
            "QKV_ROW_STRIDE": qkv,
            "Z_ROW_STRIDE": z,
            "BA_OUT_ROW_STRIDE": b,
            "ROWS_PER_ITER": self.rows_per_iter,
        }
        signature = {name: "*i16" for name in triton_split.NAMES} | {
            "total_rows": "i32",
            "rows_per_vec": "i32",
        }
        self.mlir = lower(module.fused_qkvzba_split_reshape_cat_kernel, signature, constants)
        self.order = ("mixed_qkv", "z", "b", "a", "mixed_qkvz", "mixed_ba")

    def numbers(self, case: Case, tensors: dict[str, np.ndarray]) -> list[tuple[int, str]]:
        return [(case.rows, "i32"), (self.rows_per_core, "i32")]

    def steps(self, case: Case) -> int:
        """How many times its loop body runs, all cores together."""
        spans = (min(self.rows_per_core, case.rows - i * self.rows_per_core) for i in range(self.grid))
        return sum(-(-span // self.rows_per_iter) for span in spans if span > 0)


class Ours:
    """This library's kernel."""

    def __init__(self, case: Case) -> None:
        self.cut = blocks_of(case)
        self.rows_per_iter = self.cut.rows
        plan = tiling(case.rows, self.cut.row_bytes, case.cores, case.buffer_bytes, case.max_rows_per_iter)
        self.grid, self.rows_per_core = plan.grid, plan.rows_per_core
        self.mlir = lower_case(case, False)
        self.order = triton_split.NAMES

    def numbers(self, case: Case, tensors: dict[str, np.ndarray]) -> list[tuple[int, str]]:
        strides = [(tensors[name].shape[1], "i64") for name in triton_split.NAMES]
        return [*strides, (case.rows, "i64"), (self.rows_per_core, "i64"), (self.cut.pieces, "i32")]

    def steps(self, case: Case) -> int:
        return Seed.steps(self, case) * self.cut.pieces


def is_right(subject: Seed | Ours, case: Case) -> bool:
    """Runs it on the CPU over poisoned outputs, and compares every element."""
    tensors = {
        name: np.full((case.rows, int(np.prod(tail))), -1, np.int16)
        for name, tail in zip(triton_split.NAMES, case.tails())
    }
    random = np.random.default_rng(1)
    for name in ("mixed_qkvz", "mixed_ba"):
        tensors[name][:] = random.integers(0, 1 << 15, tensors[name].shape, np.int16)
    with tempfile.TemporaryDirectory() as folder:
        program = build(subject.mlir, Path(folder))
        program(
            subject.grid,
            [tensors[name].ctypes.data for name in subject.order],
            subject.numbers(case, tensors),
        )
    for packed, features in zip(("mixed_qkvz", "mixed_ba"), packed_features(case)):
        for feature, (name, place) in enumerate(features):
            if not np.array_equal(tensors[name][:, place], tensors[packed][:, feature]):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", required=True, help="the file with the seed's kernel")
    parser.add_argument("--csv", help="where to write the figures")
    args = parser.parse_args()
    module = load(args.seed)
    columns = (
        "heads",
        "kernel",
        "rows at a time",
        "copies issued",
        "buffer bytes",
        "tile bytes",
        "operations",
        "right",
    )
    rows = []
    print(f"{TOKENS} tokens of bf16, {CORES} vector cores, interleaved")
    print("{:>8} {:>6} {:>15} {:>14} {:>13} {:>11} {:>11} {:>6}".format(*columns))
    for hk, hv in HEADS:
        case = Case((hk, hv, 128, 128), "interleaved", TOKENS, cores=CORES)
        row_bytes = 2 * 2 * (case.tails()[0][0] + case.tails()[1][0])
        for name, subject in (("gdn", Ours(case)), ("seed", Seed(module, case))):
            seen = facts(subject.mlir)
            issued = seen.copies * subject.steps(case)
            tile = subject.rows_per_iter * row_bytes // (subject.cut.pieces if name == "gdn" else 1)
            small = case._replace(rows=131)
            right = is_right(Ours(small) if name == "gdn" else Seed(module, small), small)
            row = (
                f"{hk}/{hv}",
                name,
                subject.rows_per_iter,
                issued,
                seen.buffer_bytes,
                tile,
                seen.operations,
                right,
            )
            rows.append(row)
            print("{:>8} {:>6} {:>15} {:>14} {:>13} {:>11} {:>11} {!s:>6}".format(*row), flush=True)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(columns)
            out.writerows(rows)


if __name__ == "__main__":
    main()
