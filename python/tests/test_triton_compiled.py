"""What upstream Triton makes of the kernel for an NVIDIA GPU. Compiling needs no GPU."""

import re

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdn import triton_check, triton_split

NAMES = triton_split.NAMES


def ptx(case, merge=False, stages=1):
    """PTX for sm_90, with pointers and row strides that 16 divides, as those of dense tensors are."""
    profile = triton_split.Profile(132, case.buffer_bytes, case.max_rows_per_iter, exact=False)
    cut = triton_split.blocks(case.heads, case.packing, case.sizes, profile)
    constants = triton_split.constants(case.heads, case.packing, merge, cut, stages)
    arguments = triton_split.split_kernel.arg_names
    signature, hints = {}, {}
    for at, name in enumerate(arguments):
        if name in constants:
            signature[name] = "constexpr"
        elif name in NAMES:
            signature[name] = f"*i{8 * case.sizes[name in ('mixed_ba', 'b', 'a')]}"
        else:
            signature[name] = "i32" if name == "pieces" else "i64"
        if name in NAMES or name.endswith("stride"):
            hints[(at,)] = [["tt.divisibility", 16]]
    by_place = {(arguments.index(name),): value for name, value in constants.items()}
    source = ASTSource(triton_split.split_kernel, signature, by_place, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    if not isinstance(triton_split.split_kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set")


@pytest.mark.parametrize("merge", [False, True], ids=["split", "merge"])
@pytest.mark.parametrize("packing", triton_split.PACKINGS)
@pytest.mark.parametrize(
    ("heads", "sizes", "features"),
    [
        ((16, 32, 128, 128), (2, 2), 12288),
        ((4, 8, 128, 128), (2, 2), 12288),  # four rows at a time
        ((16, 32, 128, 128), (1, 1), 24576),  # two
        ((16, 32, 64, 64), (4, 4), 6144),
    ],
)
def test_sixteen_bytes_at_a_time(heads, sizes, features, packing, merge):
    code = ptx(triton_check.Case(heads, packing, 1, sizes), merge)
    threads, wide = 8 * 32, features * sizes[0] // 16
    for direction in ("ld", "st"):
        accesses = re.findall(rf"\b{direction}\.global\S*", code)
        # Nothing but b and a is moved in less, and each of them by one access of a thread.
        assert sum(".v4." in access for access in accesses) == wide // threads
        assert len(accesses) == wide // threads + 2


@pytest.mark.parametrize("packing", triton_split.PACKINGS)
def test_the_size_is_constant_from_1_to_64_heads(packing):
    # As many rows as make the same number of elements, so that a thread has the same work in all of them.
    lines = {}
    for hk in (1, 2, 4, 8, 16, 32, 64):
        case = triton_check.Case((hk, 2 * hk, 128, 128), packing, 1)
        lines[hk] = len([line for line in ptx(case).splitlines() if re.match(r"\s+[a-z@]", line)])
    assert max(lines.values()) < 1.5 * min(lines.values()), lines


@pytest.mark.parametrize("case", [c for c in triton_check.conformance() if c.rows], ids=str)
def test_every_layout_compiles(case):
    assert ".visible .entry split_kernel" in ptx(case)
