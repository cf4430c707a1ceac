"""The Triton kernel, interpreted on the CPU and on a GPU where there is one; its checks, plans and doors."""

import importlib
import random
import re
import subprocess
import sys
import textwrap

import pytest
from conftest import TOO_OLD, interpreter_runs

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import gdn

CPU = pytest.param("cpu", marks=pytest.mark.interpreter)
GPU = pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def loaded(interpreted):
    """`gdn.triton_split` and `gdn.triton_check` anew: how a kernel runs is decided when it is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        for name in ("triton_split", "triton_check"):
            sys.modules.pop(f"gdn.{name}", None)
        return importlib.import_module("gdn.triton_split"), importlib.import_module("gdn.triton_check")


@pytest.fixture(scope="module")
def table():
    """The two modules for each device, and the environment as long as the kernel is interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        modules = {"cpu": loaded(True)}
        if torch.cuda.is_available():
            modules["cuda:0"] = loaded(False)
        yield modules
    for name in ("triton_split", "triton_check"):
        sys.modules.pop(f"gdn.{name}", None)


CASES = [
    # Rows far apart: gigabytes a tensor.
    pytest.param(case, marks=pytest.mark.large if case.rows * case.apart > 1 << 20 else ())
    for case in loaded(False)[1].conformance()
]


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bit_for_bit(table, case, device):
    split, check = table[device]
    profile = split.profile_of(*((device.split(":")[0], 0)))
    own = profile._replace(
        cores=case.cores, buffer_bytes=case.buffer_bytes, max_rows_per_iter=case.max_rows_per_iter
    )
    check.run_case(case, device, own)


@pytest.mark.interpreter
def test_a_wrong_result_is_noticed(table, monkeypatch):
    split, check = table["cpu"]
    case = check.Case((2, 4, 4, 4), "interleaved", 3)
    real = split.constants
    monkeypatch.setattr(split, "constants", lambda *a: real(*a) | {"CONTIGUOUS": True, "BLOCK_HEADS": 1})
    with pytest.raises(AssertionError, match="is wrong: split of 2/4x4"):
        check.run_case(case, "cpu", split.profile_of("cpu", 0))


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("packing", ["interleaved", "contiguous"])
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.float64, torch.bool],
    ids=str,
)
def test_the_door_of_the_package(table, dtype, packing):
    heads, n = (2, 6, 8, 4), 7
    # The module that the package finds is the one that was loaded last.
    device = list(table)[-1]
    if device == "cpu" and not interpreter_runs():
        pytest.skip(TOO_OLD)
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (n, 80 * dtype.itemsize), dtype=torch.uint8)
    qkvz, ba = bits.view(dtype).to(device), torch.randn(n, 12, device=device)
    triton = gdn.split(qkvz, ba, *heads, packing, backend="triton")
    for got, wanted in zip(triton, gdn.split(qkvz, ba, *heads, packing)):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))
    out = tuple(torch.empty_like(t) for t in triton)
    assert gdn.split(qkvz, ba, *heads, packing, out=out, backend="triton") == out
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(out, triton))
    back = gdn.merge(*triton, *heads, packing, backend="triton")
    assert torch.equal(back[0].view(torch.uint8), qkvz.view(torch.uint8)) and torch.equal(back[1], ba)
    qkv, z, b, a = triton
    flat = gdn.merge(qkv, z.flatten(1), b, a, *heads, packing, backend="triton")
    assert torch.equal(flat[0].view(torch.uint8), qkvz.view(torch.uint8))


def given(n=3, hk=2, hv=4, dk=8, dv=8):
    whole = torch.full((n, 1000), 7, dtype=torch.int16)
    tensors = [torch.full((n, f), 7, dtype=torch.int16) for f in (2 * hk * dk + 2 * hv * dv, 2 * hv)]
    tensors += [torch.full((n, 2 * hk * dk + hv * dv), 7, dtype=torch.int16)]
    tensors += [torch.full((n, hv, dv), 7, dtype=torch.int16)]
    tensors += [torch.full((n, hv), 7, dtype=torch.int16) for _ in range(2)]
    return tensors, [hk, hv, dk, dv, "interleaved"], whole


def replaced(at, make):
    def change(tensors, rest, whole):
        tensors[at] = make(tensors, whole)

    return change


def number(at, value):
    def change(tensors, rest, whole):
        rest[at] = value

    return change


WRONG = {
    "no tensor": (
        replaced(0, lambda t, w: [1]),
        TypeError,
        "mixed_qkvz is a list, it must be a torch.Tensor",
    ),
    "no dims": (replaced(1, lambda t, w: torch.tensor(1)), ValueError, "mixed_ba has 0 dimensions"),
    "dims": (replaced(1, lambda t, w: t[1][0]), ValueError, "mixed_ba has 1 dimensions, it must have 2"),
    "features": (
        replaced(0, lambda t, w: w[:, :95]),
        ValueError,
        "mixed_qkvz has 95 features, 2+4 heads of 8 need 96",
    ),
    "z": (
        replaced(3, lambda t, w: w[:, :32].view(3, 32).reshape(3, 8, 4)),
        ValueError,
        "z has 8x4 features, .* need 4x8",
    ),
    "rows": (replaced(1, lambda t, w: t[1][:2]), ValueError, "mixed_ba has 2 rows, mixed_qkvz has 3"),
    "out rows": (replaced(4, lambda t, w: t[4][:1]), ValueError, "b has 1 rows, mixed_qkvz has 3"),
    "stride": (
        replaced(0, lambda t, w: w[:, ::2][:, :96]),
        ValueError,
        "mixed_qkvz has features 2 elements apart",
    ),
    "rows too near": (
        replaced(4, lambda t, w: w[:1].view(-1).as_strided((3, 4), (2, 1))),
        ValueError,
        "b has rows 2 elements apart, a row that is written has 4",
    ),
    "dtype": (
        replaced(3, lambda t, w: t[3].int()),
        TypeError,
        "z has dtype torch.int32, mixed_qkvz has torch.int16",
    ),
    "size": (
        replaced(0, lambda t, w: torch.zeros(3, 96, dtype=torch.complex128)),
        TypeError,
        "mixed_qkvz has dtype torch.complex128: elements of 16 bytes, they must have 1, 2, 4 or 8",
    ),
    "device": (
        replaced(2, lambda t, w: t[2].to("meta")),
        ValueError,
        "mixed_qkv is on meta, mixed_qkvz is on cpu",
    ),
    "overlap": (replaced(5, lambda t, w: t[4]), ValueError, "b overlaps a"),
    "overlap with an input": (
        replaced(2, lambda t, w: t[0].view(-1)[:192].view(3, 64)),
        ValueError,
        "mixed_qkv overlaps mixed_qkvz",
    ),
    "heads": (number(0, 0), ValueError, "num_k_heads is 0, it must be at least 1"),
    "ratio": (number(1, 5), ValueError, "num_v_heads = 5 is not a multiple of num_k_heads = 2"),
    "no integer": (number(2, 8.0), TypeError, "head_k_dim is a float, it must be an integer"),
    "packing": (number(4, "both"), ValueError, "packing is 'both', it must be 'interleaved' or 'contiguous'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused_and_that_nothing_is_written(table, what):
    change, error, message = WRONG[what]
    tensors, rest, whole = given()
    change(tensors, rest, whole)
    with pytest.raises(error, match=message if ".*" in message else re.escape(message)):
        table["cpu"][0].split(*tensors[:2], *rest, tensors[2:])
    written = [t for t in tensors[2:] if t.device.type == "cpu"]
    assert all((t == 7).all() for t in written) and (whole == 7).all()


def test_out_of_another_length(table):
    tensors, rest, _ = given()
    with pytest.raises(ValueError, match="out has 3 tensors, expected 4"):
        table["cpu"][0].split(*tensors[:2], *rest, tensors[2:5])
    with pytest.raises(ValueError, match="out has 1 tensors, expected 2"):
        table["cpu"][0].merge(*tensors[2:], *rest, tensors[:1])


@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.interpreter
def test_outputs_may_be_columns_of_one_tensor(table):
    """`z` and `mixed_qkv` side by side in one buffer: their rows interleave and share nothing."""
    tensors, rest, whole = given()
    wanted = gdn.split(*tensors[:2], *rest)
    out = [whole[:, :64], whole[:, 64:96].view(3, 4, 8), whole[:, 96:100], whole[:, 100:104]]
    table["cpu"][0].split(*tensors[:2], *rest, out)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted))


def test_cpu_tensors_without_the_interpreter():
    split, _ = loaded(False)
    tensors, rest, _ = given()
    with pytest.raises(RuntimeError, match="runs on npu and cuda tensors, these are on cpu"):
        split.split(*tensors[:2], *rest, tensors[2:])
    with pytest.raises(ValueError, match="backend is 'trident'"):
        gdn.split(*tensors[:2], *rest, backend="trident")


def test_no_block_is_larger_than_the_buffer():
    """Over random layouts and buffers: what is cut covers every head, fits, and is as large as fits."""
    split, _ = loaded(False)
    pick = random.Random(5)
    for _ in range(3000):
        hk, r = pick.randint(1, 64), pick.randint(1, 9)
        heads = (hk, hk * r, pick.randint(1, 300), pick.randint(1, 300))
        packing, sizes = pick.choice(split.PACKINGS), (pick.choice((1, 2, 4, 8)), pick.choice((1, 2, 4, 8)))
        profile = split.Profile(
            pick.randint(1, 99), pick.choice((200, 5_000, 85 * 1024, 190_000)), exact=pick.random() < 0.5
        )
        cut = split.blocks(heads, packing, sizes, profile)
        smallest = 2 * (4 * sizes[0] + 2 * sizes[1])
        assert cut.rows * cut.row_bytes <= max(profile.buffer_bytes, smallest)
        assert cut.rows & (cut.rows - 1) == 0 and 1 <= cut.rows <= 64
        assert cut.pieces * cut.heads == hk * cut.parts and (cut.parts == 1 or cut.heads == 1)
        whole = 2 * 2 * ((hk * heads[2] * 2 + 2 * heads[1] * heads[3]) // 2 * sizes[0] + heads[1] * sizes[1])
        if profile.exact and cut.pieces == 1:
            assert cut.row_bytes == whole
        if profile.exact and whole <= profile.buffer_bytes:
            assert cut.pieces == 1


def test_nothing_compiled_depends_on_the_number_of_rows():
    split, _ = loaded(False)
    run_time = {p.name: p for p in split.split_kernel.params if not p.is_constexpr}
    for name in ("num_rows", "rows_per_core", "pieces"):
        assert run_time[name].do_not_specialize and run_time[name].annotation_type in ("i64", "i32")
    cut = split.blocks((4, 8, 16, 16), "interleaved", (2, 2), split.Profile(4))
    constants = split.constants((4, 8, 16, 16), "interleaved", False, cut)
    assert {p.name for p in split.split_kernel.params if p.is_constexpr} == set(constants)


def test_the_operator_on_npu_tensors(tmp_path):
    """PyTorch's place for a device from outside, under torch_npu's name; the launch only records."""
    pytest.importorskip("torch.utils.backend_registration")
    code = """
        import torch
        from torch.utils import backend_registration
        import gdn
        from gdn import triton_split

        backend_registration._setup_privateuseone_for_python_backend("npu")
        new = lambda size, dtype=None, *_, **__: torch._C._acc.create_empty_tensor(list(size), dtype)
        library = torch.library.Library("aten", "IMPL")
        library.impl("empty.memory_format", new, "PrivateUse1")
        strided = lambda size, stride, dtype=None, *_, **__: new(size, dtype)
        library.impl("empty_strided", strided, "PrivateUse1")

        for name in ("gdn::split", "gdn::merge"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "AutogradPrivateUse1")
        launched = []
        kinds = lambda tensors: {t.device.type for t in tensors}
        triton_split._launch = lambda tensors, *rest: launched.append((kinds(tensors), *rest))
        triton_split._Span.overlaps = lambda *_: False  # these tensors have no memory
        qkvz, ba = new([5, 160], torch.bfloat16), new([5, 8], torch.float32)
        heads = (2, 4, 8, 16)
        for out in (
            gdn.split(qkvz, ba, *heads),
            torch.ops.gdn.split(qkvz, ba, *heads, "contiguous"),
            gdn.fused_qkvzba_split_reshape_cat(qkvz, ba, *heads),
        ):
            assert [tuple(t.shape) for t in out] == [(5, 96), (5, 4, 16), (5, 4), (5, 4)], out
            assert all(t.device.type == "npu" for t in out)
        assert gdn.split(qkvz, ba, *heads, out=out) == tuple(out)
        back = gdn.merge(*out, *heads)
        assert [tuple(t.shape) for t in back] == [(5, 160), (5, 8)]
        gdn.merge(*out, *heads, "contiguous", out=back)
        torch.ops.gdn.merge.out(*out, *heads, mixed_qkvz=back[0], mixed_ba=back[1])
        print([(devices, packing, merge) for devices, _, packing, merge, _ in launched])
        try:
            gdn.split(new([5, 150], torch.bfloat16), ba, *heads)
        except ValueError as error:
            print(error)
    """
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch cannot have a device made in Python")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    calls, error = done.stdout.strip().splitlines()
    kinds = [("interleaved", False), ("contiguous", False), ("interleaved", False), ("interleaved", False)]
    kinds += [("interleaved", True), ("contiguous", True), ("interleaved", True)]
    assert calls == str([({"npu"}, *kind) for kind in kinds])
    assert "150 features" in error or "shape" in error or "160" in error
