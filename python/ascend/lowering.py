"""The Triton kernel through triton-ascend's front half: to the MLIR that Ascend's own back end takes in.

Needs triton-ascend and neither an NPU nor CANN nor torch. What comes out shows every copy between memory and
the on-chip buffer (`memref.copy`, `bufferization.materialize_in_destination`), every buffer (`memref.alloc`)
and the loops.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, NamedTuple

from triton._C.libtriton import ir
from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdn import triton_split

if TYPE_CHECKING:
    from gdn.triton_check import Case

TARGET = GPUTarget("npu", "Ascend910B3", 0)


def lower(kernel: object, signature: dict[str, str], constants: dict[str, object]) -> str:
    """The MLIR of one specialisation of a kernel."""
    backend = AscendBackend(TARGET)
    options = backend.parse_options({})
    source = ASTSource(kernel, signature=signature, constants=constants)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    metadata = {"target": TARGET, "hash": "gdn", **options.__dict__}
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    return ttir_to_linalg(make_ttir(module, metadata, options), metadata, options, named_ops=True)


def blocks_of(case: Case) -> triton_split.Blocks:
    """How the case's rows are cut on an NPU with the case's buffer."""
    profile = triton_split.Profile(case.cores, case.buffer_bytes, case.max_rows_per_iter)
    return triton_split.blocks(case.heads, case.packing, case.sizes, profile)


def lower_case(case: Case, merge: bool) -> str:
    """The MLIR of `split_kernel` for a case of the conformance table."""
    constants = triton_split.constants(case.heads, case.packing, merge, blocks_of(case))
    size, ba_size = case.sizes
    signature = {
        name: f"*i{8 * (ba_size if name in ('mixed_ba', 'b', 'a') else size)}" for name in triton_split.NAMES
    }
    run_time = [name for name in triton_split.split_kernel.arg_names if name not in {*constants, *signature}]
    signature |= {name: "i32" if name == "pieces" else "i64" for name in run_time}
    return lower(triton_split.split_kernel, signature, constants)


class Facts(NamedTuple):
    """What can be read off a lowered program."""

    copies: int
    """Copies written down in it, in and out."""
    buffer_bytes: int
    """On-chip buffers together."""
    operations: int
    """Operations, constants apart."""
    loops: int
    gathers: list[str]
    """Lines that move single elements where a copy moves blocks."""


BITS = {"bf16": 16, "f16": 16, "f32": 32} | {f"i{8 << n}": 8 << n for n in range(4)}
OPERATION = re.compile(r"^\s*(?:%[\w:, %]+ = )?(\w+\.\w+)")
COPIES = ("memref.copy", "bufferization.materialize_in_destination")
ELEMENTWISE = ("memref.load", "memref.store", "tensor.extract", "tensor.insert", "tt.load", "tt.store")


def facts(mlir: str) -> Facts:
    """Counts copies, buffers, operations and loops of a lowered program."""
    names = [match[1] for line in mlir.splitlines() if (match := OPERATION.match(line))]
    buffers = 0
    for shape, kind in re.findall(r"memref\.alloc\(\)[^:]*: memref<((?:\d+x)*)(\w+)>", mlir):
        buffers += math.prod(int(n) for n in shape.split("x") if n) * BITS[kind] // 8
    assert mlir.count("memref.alloc") == len(re.findall(r"memref\.alloc\(\)", mlir)), (
        "a buffer of unknown size"
    )
    return Facts(
        copies=sum(names.count(copy) for copy in COPIES),
        buffer_bytes=buffers,
        operations=sum(name != "arith.constant" for name in names),
        loops=names.count("scf.for"),
        gathers=[name for name in names if name in ELEMENTWISE or "gather" in name or "scatter" in name],
    )
