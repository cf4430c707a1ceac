"""What is wrong is refused, by name and with both numbers, through every door; nothing has been written."""

import copy
import multiprocessing
import pickle

import pytest

torch = pytest.importorskip("torch")

import oracle
from test_split import empty_packed, empty_parts

import gdn

HEADS = (2, 4, 8, 16)
WIDE = oracle.features(HEADS)
F32 = torch.float32


def good(device="cpu"):
    """Arguments of a split of three rows, by name."""
    qkvz, ba = oracle.packed(3, HEADS, F32, device=device)
    return dict(mixed_qkvz=qkvz, mixed_ba=ba)


def good_parts(device="cpu"):
    """Arguments of a merge."""
    arguments = good(device)
    return dict(zip(["mixed_qkv", "z", "b", "a"], gdn.split(*arguments.values(), *HEADS), strict=True))


def fails(direction, arguments, message, error=ValueError, heads=HEADS, packing="interleaved", out=None, n=3):
    """Both functions and both operators refuse, each with the sentence, and leave poison as it was."""
    device = next((str(one.device) for one in arguments.values() if isinstance(one, torch.Tensor)), "cpu")
    device = "cpu" if device == "meta" else device
    like = torch.empty(n, 0, dtype=F32, device=device)
    make = empty_parts if direction == "split" else empty_packed
    guarded = make(like, like, HEADS)
    outs = {name: one.view for name, one in guarded.items()} | (out or {})
    function, operator = getattr(gdn, direction), getattr(torch.ops.gdn, direction)
    calls = [
        lambda: function(**arguments, **named(heads), packing=packing, out=tuple(outs.values())),
        lambda: operator.out(**arguments, **named(heads), packing=packing, **outs),
    ]
    if out is None:
        calls += [
            lambda: function(**arguments, **named(heads), packing=packing),
            lambda: operator(**arguments, **named(heads), packing=packing),
        ]
    for i, call in enumerate(calls):
        with pytest.raises(error if i % 2 == 0 else RuntimeError, match=message):
            call()
    assert all(one.is_untouched() for one in guarded.values())


def named(heads):
    return dict(zip(["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"], heads, strict=True))


@pytest.mark.parametrize(
    "heads, message",
    [
        ((0, 4, 8, 16), "num_k_heads is 0, it must be at least 1"),
        ((2, 0, 8, 16), "num_v_heads is 0, it must be at least 1"),
        ((2, 4, 0, 16), "head_k_dim is 0, it must be at least 1"),
        ((2, 4, 8, 0), "head_v_dim is 0, it must be at least 1"),
        ((-2, 4, 8, 16), "num_k_heads is -2, it must be at least 1"),
        ((2, 4, 8, -(2**63)), "head_v_dim is -9223372036854775808, it must be at least 1"),
        ((2, 3, 8, 16), "num_v_heads = 3 is not a multiple of num_k_heads = 2"),
        ((4, 2, 8, 16), "num_v_heads = 2 is not a multiple of num_k_heads = 4"),
        ((2, 4, 8, 15), "mixed_qkvz has 160 features, 2\\+4 heads of 8\\+15 need 152|z has shape"),
        ((1, 2, 16, 32), "mixed_ba has 8 features, 1\\+2 heads of 16\\+32 need 4|z has shape"),
        ((2**62, 2**62, 2**62, 2**62), "4611686018427387904"),
        ((1, 1, 2**63 - 1, 1), "9223372036854775807"),
    ],
)
def test_heads(heads, message, device):
    fails("split", good(device), message, heads=heads)


@pytest.mark.parametrize("packing", ["", "Interleaved", "inter\0leaved", "contiguous ", "ü" * 300])
def test_packing(packing, device):
    sentence = "packing is '[^']*', it must be 'interleaved' or 'contiguous'"
    fails("split", good(device), sentence, packing=packing)
    fails("merge", good_parts(device), sentence, packing=packing)


@pytest.mark.parametrize("name", ["mixed_qkvz", "mixed_ba"])
def test_shapes_that_are_split(name, device):
    arguments, wide = good(device), WIDE[name]
    other = "mixed_ba" if name == "mixed_qkvz" else "mixed_qkvz"
    one = arguments[name]

    def with_(tensor):
        return arguments | {name: tensor}

    fails("split", with_(one[:, :-1].contiguous()), f"{name} has {wide - 1} features, .* need {wide}")
    fails("split", with_(torch.cat([one, one], 1)), f"{name} has {2 * wide} features, .* need {wide}")
    fails("split", with_(one[:2]), f"(mixed_ba|mixed_qkv|{name}|{other}) has [23] rows, mixed_qkvz has [23]")
    fails("split", with_(one[0]), f"{name} has shape \\[{wide}\\], expected")
    fails("split", with_(one[None]), f"{name} has shape \\[1, 3, {wide}\\], expected")
    fails("split", with_(one[None, None]), f"{name} has shape \\[1, 1, 3, {wide}\\], expected")
    fails("split", with_(one[None, None, None, None]), f"{name} has 6 dims, expected at most 5")
    fails("split", with_(one[0, 0]), f"{name} has shape \\[\\], expected")
    every_other = one.repeat_interleave(2, 1)[:, ::2]
    fails("split", with_(every_other), f"{name} has stride 2 in dim 1, expected 1")
    fails("split", with_(one.t().contiguous().t()), f"{name} has stride 3 in dim 1, expected 1")


@pytest.mark.parametrize("name", ["mixed_qkv", "z", "b", "a"])
def test_shapes_that_are_merged(name, device):
    parts = good_parts(device)
    wide, one = WIDE[name], parts[name]
    flat = one.flatten(1)

    def with_(tensor):
        return parts | {name: tensor}

    fails("merge", with_(flat[:, :-1].contiguous()), f"{name} has {wide - 1} features, .* need {wide}")
    fails("merge", with_(one[:2]), "has [23] rows, .* has [23]")
    fails("merge", with_(flat[0]), f"{name} has shape \\[{wide}\\], expected")
    if name == "z":
        fails(
            "merge",
            with_(one.transpose(1, 2).contiguous()),
            "z has shape \\[3, 16, 4\\], expected \\[N, 4, 16\\]",
        )
        heads_apart = torch.empty(3, 4, 17, device=device)[:, :, :16]
        fails("merge", with_(heads_apart), "z has stride 17 in dim 1, expected 16")
    else:
        fails("merge", with_(flat[:, None]), f"{name} has shape \\[3, 1, {wide}\\], expected")


@pytest.mark.parametrize("name", ["mixed_qkv", "z", "b", "a"])
def test_shapes_that_are_written(name, device):
    arguments, wide = good(device), WIDE[name]
    shape = (4, 16) if name == "z" else (wide,)

    def wrong(*shape):
        return {name: torch.empty(*shape, device=device)}

    fails("split", arguments, f"{name} has 2 rows, mixed_qkvz has 3", out=wrong(2, *shape))
    fails("split", arguments, f"{name} has {wide + 1} features, .* need {wide}", out=wrong(3, wide + 1))
    fails("split", arguments, f"{name} has shape \\[{wide}\\], expected", out=wrong(wide))
    once = torch.empty(1, wide, device=device).expand(3, -1)
    fails("split", arguments, f"{name}: row_stride = 0 is shorter than a row of {wide}", out={name: once})


@pytest.mark.parametrize("name", ["mixed_qkv", "z", "b", "a"])
def test_dtypes(name, device):
    like = {"mixed_qkv": "mixed_qkvz", "z": "mixed_qkvz"}.get(name, "mixed_ba")
    half = empty_parts(*(torch.empty(3, 0, dtype=torch.float16, device=device),) * 2, HEADS)[name].view
    sentence = f"{name} has dtype float16, {like} has float32"
    fails("split", good(device), sentence, TypeError, out={name: half})
    same_size = half.view(torch.int16)
    fails(
        "split", good(device), f"{name} has dtype int16, {like} has float32", TypeError, out={name: same_size}
    )
    if name in ("z", "a"):
        parts = good_parts(device)
        other = {"z": "mixed_qkv", "a": "b"}[name]
        sentence = f"{name} has dtype float16, {other} has float32"
        fails("merge", parts | {name: parts[name].half()}, sentence, TypeError)


@pytest.mark.parametrize("kind", ["none", "number", "text", "list", "sparse", "quantized", "type"])
@pytest.mark.parametrize("name", ["mixed_qkvz", "mixed_ba"])
def test_no_tensors(kind, name):
    arguments = good()
    arguments[name] = {
        "none": lambda: None,
        "number": lambda: 3.0,
        "text": lambda: "mixed_qkvz",
        "list": lambda: arguments[name].tolist(),
        "sparse": lambda: arguments[name].to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3, WIDE[name]), 1.0, 0, torch.qint8),
        "type": lambda: torch.Tensor,
    }[kind]()
    error = (
        (TypeError, ValueError)
        if kind not in ("sparse", "quantized")
        else (TypeError, ValueError, RuntimeError)
    )
    with pytest.raises(error) as caught:
        gdn.split(**arguments, **named(HEADS))
    if kind not in ("sparse", "quantized"):
        assert name in str(caught.value)
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.gdn.split(**arguments, **named(HEADS))


TOO_BIG = [2**63, -(2**63) - 1, 10**30]


@pytest.mark.parametrize("value", [None, "2", 2.5, [2], *TOO_BIG])
@pytest.mark.parametrize("name", ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"])
def test_no_numbers(name, value):
    for function, arguments in [(gdn.split, good()), (gdn.merge, good_parts())]:
        with pytest.raises(ValueError if value in TOO_BIG else TypeError, match=name):
            function(**arguments, **(named(HEADS) | {name: value}))


def test_arguments_missing_or_unknown():
    with pytest.raises(TypeError, match="mixed_ba"):
        gdn.split(good()["mixed_qkvz"])
    with pytest.raises(TypeError, match="packings"):
        gdn.split(**good(), **named(HEADS), packings="contiguous")
    with pytest.raises(TypeError):
        gdn.split(**good(), **named(HEADS), packing=3)
    with pytest.raises(ValueError, match="backend is 'cuda', expected None or 'triton'"):
        gdn.split(**good(), **named(HEADS), backend="cuda")


@pytest.mark.parametrize("out", [(), 3, "four", "tensors", [None] * 4, range(4)], ids=str)
def test_out_that_is_no_tuple_of_tensors(out):
    out = (
        tuple(empty_parts(*good().values(), HEADS)[name].view for name in ("z", "b", "a"))
        if out == "tensors"
        else out
    )
    with pytest.raises((ValueError, TypeError), match="out|mixed_qkv"):
        gdn.split(**good(), **named(HEADS), out=out)
    with pytest.raises((ValueError, TypeError), match="out|mixed_qkvz"):
        gdn.merge(**good_parts(), **named(HEADS), out=out)


def test_out_may_be_a_list():
    out = [one.view for one in empty_parts(*good().values(), HEADS).values()]
    got = gdn.split(**good(), **named(HEADS), out=out)
    oracle.same(tuple(got), oracle.split_bits(*good().values(), HEADS, "interleaved"))


def test_overlaps(device):
    arguments, parts = good(device), good_parts(device)
    sentence = "(\\w+) overlaps (\\w+): \\d+ bytes"
    row = torch.empty(3, WIDE["mixed_qkv"], device=device)
    within = arguments["mixed_qkvz"][:, : WIDE["mixed_qkv"]]
    before = within.clone()
    fails("split", arguments, sentence, out=dict(mixed_qkv=within))
    assert torch.equal(oracle.bits(within), oracle.bits(before))
    fails("split", arguments, sentence, out=dict(b=row[:, :4], a=row[:, 3:7]))
    fails("split", arguments, sentence, out=dict(mixed_qkv=row, z=row[:, :64].view(3, 4, 16)))
    shifted = torch.empty(4 * WIDE["b"], device=device)
    a, b = shifted[:12].view(3, 4), shifted[1:13].view(3, 4)
    fails("split", arguments, sentence, out=dict(b=b, a=a))
    fails("merge", parts, sentence, out=dict(mixed_ba=parts["mixed_qkv"][:, :8]))
    rows_overlap = torch.empty(200, device=device).as_strided((3, 64), (10, 1))
    fails(
        "split",
        arguments,
        "z: row_stride = 10 is shorter than a row of 64 features",
        out=dict(z=rows_overlap),
    )


def test_neighbours_do_not_overlap(device):
    """Interleaved rows of two outputs in one buffer share no byte."""
    buffer = torch.full((3, 8), torch.nan, device=device)
    out = {name: one.view for name, one in empty_parts(*good(device).values(), HEADS).items()}
    out |= dict(b=buffer[:, :4], a=buffer[:, 4:])
    gdn.split(**good(device), **named(HEADS), out=tuple(out.values()))
    expected = oracle.split_bits(*good(device).values(), HEADS, "interleaved")
    assert torch.equal(oracle.bits(buffer), torch.cat(expected[2:], 1))


def test_meta_tensors_have_no_memory():
    arguments = good()
    meta = {name: one.to("meta") for name, one in arguments.items()}
    parts = gdn.split(**meta, **named(HEADS))
    assert [part.shape for part in parts] == [(3, 96), (3, 4, 16), (3, 4), (3, 4)]
    parts = torch.ops.gdn.split(**meta, **named(HEADS))
    assert all(part.device.type == "meta" for part in parts)


def test_frameworks_are_not_mixed():
    numpy = pytest.importorskip("numpy")
    arguments = good()
    arrays = {name: one.numpy() for name, one in arguments.items()}
    with pytest.raises(TypeError, match="mixed_ba is a numpy.ndarray, mixed_qkvz is a torch.Tensor"):
        gdn.split(**(arguments | dict(mixed_ba=arrays["mixed_ba"])), **named(HEADS))
    out = tuple(numpy.empty(one.view.shape, "f4") for one in empty_parts(*arguments.values(), HEADS).values())
    with pytest.raises(TypeError, match="mixed_qkv is a numpy.ndarray, mixed_qkvz is a torch.Tensor"):
        gdn.split(**arguments, **named(HEADS), out=out)


def freed(tensor):
    """A tensor whose storage was given up, as FSDP does between layers."""
    made = tensor.clone()
    made.untyped_storage().resize_(0)
    return made


def freed_part(tensor):
    """The same of a part of a larger storage, whose address is an offset from nothing."""
    whole = torch.zeros(2 * tensor.numel() + 4096, dtype=tensor.dtype, device=tensor.device)
    part = whole[4096 : 4096 + tensor.numel()].view(tensor.shape)
    whole.untyped_storage().resize_(0)
    return part


@pytest.mark.parametrize("free", [freed, freed_part])
@pytest.mark.parametrize("name", ["mixed_qkvz", "mixed_ba", "mixed_qkv", "z", "b", "a"])
def test_tensors_whose_storage_was_freed(name, free, device):
    arguments, parts = good(device), good_parts(device)
    sentence = f"{name} has shape \\[3, .*\\] and no memory: was its storage freed"
    if name in arguments:
        fails("split", arguments | {name: free(arguments[name])}, sentence)
        fails("merge", parts, sentence, out={name: free(arguments[name])})
    else:
        fails("merge", parts | {name: free(parts[name])}, sentence)
        fails("split", arguments, sentence, out={name: free(parts[name])})


@pytest.mark.parametrize("free", [freed, freed_part])
def test_weights_whose_storage_was_freed(free, device):
    weight = free(torch.zeros(160, 3, device=device))
    for given in (weight, torch.nn.Parameter(weight)):
        with pytest.raises(ValueError, match="weight has shape .* and no memory: was its storage freed"):
            gdn.repack_weight(given, HEADS)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="mixed_qkvz has shape .* and no memory: was its storage freed"):
        gdn.split(free(good(device)["mixed_qkvz"]), good(device)["mixed_ba"], *HEADS, backend="triton")


@pytest.mark.parametrize("kind", ["meta", "subclass", "sparse", "complex", "negated", "list"])
def test_outputs_that_cannot_be_written_to(kind, device):
    """Each sentence is about the argument that is wrong, and about what is wrong with it."""
    arguments = good(device)
    out = [one.view for one in empty_parts(*arguments.values(), HEADS).values()]
    subclass = type("Mine", (torch.Tensor,), {})
    wrong, error, sentence = {
        "meta": (lambda z: z.to("meta"), ValueError, "z is on meta, mixed_qkvz is on "),
        "subclass": (lambda z: z.as_subclass(subclass), TypeError, "z is a .*Mine, expected a torch.Tensor"),
        "sparse": (
            lambda z: z.to_sparse(),
            TypeError,
            "z has layout torch.sparse_coo, expected torch.strided",
        ),
        "complex": (
            lambda z: z.to(torch.complex64),
            TypeError,
            "z has dtype .*complex64, mixed_qkvz has .*float32",
        ),
        "negated": (
            lambda z: torch.complex(z, z).conj().imag,
            ValueError,
            "z (is a view that is negated|has stride)",
        ),
        "list": (lambda z: z.tolist(), TypeError, "z is a list, mixed_qkvz is a torch.Tensor"),
    }[kind]
    before = [one.clone() for one in out]
    with pytest.raises(error, match=sentence):
        gdn.split(**arguments, **named(HEADS), out=(out[0], wrong(torch.zeros_like(out[1])), *out[2:]))
    assert all(map(torch.equal, map(oracle.bits, out), map(oracle.bits, before)))


def test_outputs_of_inference_mode(device):
    """They may be written to in inference mode, as PyTorch has it, and nowhere else."""
    arguments = good(device)
    with torch.inference_mode():
        made = {name: one.view.clone() for name, one in empty_parts(*arguments.values(), HEADS).items()}
    before = oracle.bits(made["z"]).clone()
    fails(
        "split",
        arguments,
        "z was made in inference mode, it can be written to in inference mode",
        out=dict(z=made["z"]),
    )
    assert torch.equal(oracle.bits(made["z"]), before)
    with torch.no_grad(), pytest.raises(ValueError, match="mixed_qkv was made in inference mode"):
        gdn.split(**arguments, **named(HEADS), out=tuple(made.values()))
    with torch.inference_mode():
        gdn.split(**arguments, **named(HEADS), out=tuple(made.values()))
    oracle.same(tuple(made.values()), oracle.split_bits(*arguments.values(), HEADS, "interleaved"))


HUGE = [(1, 1, 2**40, 2**40), (1, 1, 1, 2**55), (2**30, 2**30, 1, 1), (1, 2**32, 1, 1)]


@pytest.mark.parametrize("heads", HUGE, ids=str)
def test_wrong_heads_are_told_before_outputs_are_made(heads, device):
    sentence = "mixed_qkvz has 160 features, .* need \\d+"
    fails("split", good(device), sentence, heads=heads)
    fails("merge", good_parts(device), "mixed_qkv has 96 features, .* need \\d+|z has shape", heads=heads)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="mixed_qkvz has 160 features"):
        gdn.split(**good(device), **named(heads), backend="triton")


def test_expanded_inputs_are_told_before_outputs_are_made(device):
    """As many rows as are asked for, and no memory behind them."""
    arguments = good(device)
    arguments = {name: one[:1].expand(2**40, -1) for name, one in arguments.items()}
    fails("split", arguments, "mixed_qkvz: row_stride = 0 is shorter than a row of 160 features")


@pytest.mark.gpus(1)
@pytest.mark.large
@pytest.mark.parametrize("door", [gdn.split, torch.ops.gdn.split], ids=["function", "operator"])
def test_no_memory_on_a_gpu(door):
    """The function raises what PyTorch raises; the operator a RuntimeError, of which that is one."""
    if door is not gdn.split and torch.__version__ < "2.13":
        pytest.skip("PyTorch's C functions give the text of an error from 2.13 on")
    size = torch.cuda.get_device_properties(0).total_memory * 6 // 10 // 160
    qkvz = torch.empty(size, 160, dtype=torch.uint8, device="cuda")
    ba = torch.empty(size, 8, dtype=torch.uint8, device="cuda")
    error = torch.OutOfMemoryError if door is gdn.split else RuntimeError
    with pytest.raises(error, match="out of memory"):
        door(qkvz, ba, *HEADS)
    del qkvz, ba
    torch.cuda.empty_cache()


NUMBERS = [2**63, -(2**63) - 1, 10**30, -1, 10**5000]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value.bit_length()))
def test_numbers_of_any_size(value):
    """Every whole number that an argument can be, and none is an OverflowError."""
    weight, heads = torch.zeros(160, 2), gdn.Heads(*HEADS)
    for name, call in {
        "rows": lambda: gdn.tiling(value, 1, 1),
        "row_bytes": lambda: gdn.tiling(1, value, 1),
        "cores": lambda: gdn.tiling(1, 1, value),
        "buffer_bytes": lambda: gdn.tiling(1, 1, 1, value),
        "max_rows_per_iter": lambda: gdn.tiling(1, 1, 1, 1, value),
        "tp_size": lambda: heads.shard(value),
        "num_k_heads": lambda: gdn.Heads(value, 4, 8, 16).shard(1),
        "dim": lambda: gdn.repack_weight(weight, HEADS, value),
        "block": lambda: gdn.repack_weight(weight, HEADS, block=value),
        "group": lambda: gdn.repack_weight(weight, HEADS, group=value),
        "head_v_dim": lambda: gdn.repack_weight(weight, (2, 4, 8, value)),
    }.items():
        with pytest.raises(ValueError, match=f"{name} is .*, it must be "):
            call()
    for weight in (torch.zeros(160, 2, requires_grad=True), torch.zeros(160, 2, device="meta")):
        with pytest.raises(ValueError, match="dim is"):
            gdn.repack_weight(weight, HEADS, value)
        with pytest.raises(ValueError, match="block is"):
            gdn.repack_weight(weight, HEADS, block=value)


@pytest.mark.parametrize("value", [None, "2", 2.5, [2], b"2"], ids=str)
def test_what_is_no_number_or_text(value):
    weight = torch.zeros(160, 2)
    for name, call in {
        "rows": lambda: gdn.tiling(value, 1, 1),
        "tp_size": lambda: gdn.Heads(*HEADS).shard(value),
        "dim": lambda: gdn.repack_weight(weight, HEADS, value),
        "group": lambda: gdn.repack_weight(weight, HEADS, group=value),
        "num_v_heads": lambda: gdn.repack_weight(weight, (2, value, 8, 16)),
    }.items():
        with pytest.raises(TypeError, match=f"{name} is a .*, expected int"):
            call()
    if not isinstance(value, str):
        with pytest.raises(TypeError, match="to is a .*, expected str"):
            gdn.repack_weight(weight, HEADS, to=value)
        with pytest.raises(TypeError, match="name is a .*, expected str"):
            gdn.preset(value)
        if value is not None:
            with pytest.raises(TypeError, match="projection is a .*, expected str"):
                gdn.repack_weight(weight, HEADS, projection=value)
    for heads in (3, (2, 4, 8), (2, 4, 8, 16, 1), None):
        with pytest.raises(
            ValueError, match="heads is .*, expected \\(num_k_heads, num_v_heads, head_k_dim, head_v_dim"
        ):
            gdn.repack_weight(weight, heads)
    with pytest.raises(ValueError, match="to is 'both', it must be 'interleaved' or 'contiguous'"):
        gdn.repack_weight(weight, HEADS, to="both")
    with pytest.raises(ValueError, match="packing is '.*', it must be"):
        gdn.split(**good(), **named(HEADS), packing="\ud800")


def test_weights_of_no_bytes_take_no_time():
    """As many outputs as heads say, which may be billions, and nothing to move."""
    for weight in (torch.zeros(2**34, 0), torch.zeros(2**34, 0, device="meta")):
        got = gdn.repack_weight(weight, (2**32, 2**32, 1, 1))
        assert got.shape == weight.shape and got.device == weight.device
    with pytest.raises(ValueError, match="weight has 17179869184 outputs, .* need 64 or 16"):
        gdn.repack_weight(torch.zeros(2**34, 0), (8, 8, 2, 2))


def test_heads_that_a_few_blocks_cannot_follow():
    """One block of all outputs fits any heads, and a map would take memory for each."""
    for weight in (torch.zeros(1, 2), torch.zeros(1, 2, device="meta"), torch.zeros(1, 2).numpy()):
        with pytest.raises(ValueError, match="num_k_heads = 1099511627776: no tensor of 1 along"):
            gdn.repack_weight(weight, (2**40, 2**40, 1, 1), projection="ba", block=2**50)


def test_sparse_weights_are_refused():
    with pytest.raises(TypeError, match="weight has layout torch.sparse_coo, expected torch.strided"):
        gdn.repack_weight(torch.zeros(160, 2).to_sparse(), HEADS)


def caught():
    with pytest.raises(ValueError) as value:
        gdn.split(**good(), **named((2, 4, 8, 15)))
    with pytest.raises(TypeError) as ty:
        gdn.split(None, None, *HEADS)
    with pytest.raises(RuntimeError) as runtime:
        torch.ops.gdn.split(**good(), **named((2, 4, 8, 15)))
    return [value.value, ty.value, runtime.value]


def test_errors_are_pickled():
    for error in caught():
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is type(error) and str(again) == str(error)


def refuse(_):
    gdn.split(**good(), **named((2, 4, 8, 15)))


def test_errors_come_out_of_other_processes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(ValueError, match="mixed_qkvz has 160 features"):
            pool.map_async(refuse, [0]).get(timeout=120)


@pytest.mark.gpus(1)
def test_devices_are_not_mixed_with_a_gpu():
    here, there = good(), good("cuda")
    fails("split", here | dict(mixed_ba=there["mixed_ba"]), "mixed_ba is on cuda:0, mixed_qkvz is on cpu")
    fails("split", there | dict(mixed_ba=here["mixed_ba"]), "mixed_ba is on cpu, mixed_qkvz is on cuda:0")
    out = empty_parts(*here.values(), HEADS)["z"].view
    fails("split", there, "z is on cpu, mixed_qkvz is on cuda:0", out=dict(z=out))


@pytest.mark.gpus(2)
def test_devices_are_not_mixed_among_gpus():
    here, there = good("cuda:0"), good("cuda:1")
    fails("split", here | dict(mixed_ba=there["mixed_ba"]), "mixed_ba is on cuda:1, mixed_qkvz is on cuda:0")
