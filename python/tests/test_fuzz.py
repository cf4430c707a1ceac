"""Calls at random, right ones and wrong ones: right ones give the definition's bits, wrong ones a sentence that names an argument.

Seeded, so that a failure comes again: `pytest tests/test_fuzz.py --fuzz 100000` for more of them, `--fuzz-seed` for others.
"""

from __future__ import annotations

import math
import random
import re

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

import oracle
import oracle_numpy

import gdn

NAMES = ("mixed_qkvz", "mixed_ba", "mixed_qkv", "z", "b", "a")
HEADS = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32, "int64": torch.int64}
ODD = [0, -1, 3, 7, 2**31, 2**40, 2**62, 2**63, -(2**63) - 1, 10**400, True]
NO_NUMBERS = [None, 2.0, "2", [2], 1j, float("nan"), b"4"]
NO_TENSORS = [
    None,
    3,
    "rows",
    [[1.0]],
    object(),
    {},
    torch.float32,
    torch.Tensor,
    np.float32(1),
    memoryview(b"1234"),
]
#: What a sentence names: an argument, or the part of one.
NAMED = re.compile(
    "|".join([*NAMES, *HEADS, "heads", "packing", "out", "weight", "dim", "block", "group", "to is"])
)
#: What a call may raise. An operator raises RuntimeError, with the same sentence, and PyTorch checks its arguments' types.
REFUSED = (ValueError, TypeError)


def freed(one):
    made = one.clone()
    made.untyped_storage().resize_(0)
    return made


class Call:
    """Arguments of a split or merge, of PyTorch or NumPy, right at first."""

    def __init__(self, pick: random.Random):
        self.pick = pick
        self.heads = [
            hk := pick.randint(1, 4),
            hk * pick.randint(1, 4),
            pick.randint(1, 9),
            pick.randint(1, 9),
        ]
        self.numbers = list(self.heads)
        self.packing = self.named = pick.choice(["interleaved", "contiguous"])
        self.n = pick.choice([0, 1, 2, 3, 5, 17, 700])
        self.is_torch = pick.random() < 0.6
        self.name = pick.choice(["split", "merge"])
        dtypes = [pick.choice(list(DTYPES)) for _ in range(2)]
        wide = oracle.features(tuple(self.heads))
        make = self.tensor if self.is_torch else self.array
        made = [make(name, wide[name], dtypes[name in ("mixed_ba", "b", "a")]) for name in NAMES]
        split = self.name == "split"
        self.names, self.read = (NAMES[:2], made[:2]) if split else (NAMES[2:], made[2:])
        self.out_names, self.out = (NAMES[2:], made[2:]) if split else (NAMES[:2], made[:2])
        self.gives_out = pick.random() < 0.6
        self.is_operator = self.is_torch and pick.random() < 0.4

    def shape(self, name, wide):
        return (self.n, *self.heads[1::2]) if name == "z" else (self.n, wide)

    def tensor(self, name, wide, dtype):
        gap, offset = self.pick.choice([(0, 0), (3, 0), (0, 1), (17, 5)])
        made = oracle.Guarded.make(self.shape(name, wide), DTYPES[dtype], "cpu", gap, offset).view
        made.copy_(
            oracle.anything((self.n, wide), DTYPES[dtype], seed=self.pick.randrange(99)).view(made.shape)
        )
        return made

    def array(self, name, wide, dtype):
        whole = np.frombuffer(
            self.pick.randbytes((self.n * (wide + 5) + 9) * np.dtype(dtype).itemsize), dtype
        ).copy()
        gap = self.pick.choice([0, 5])
        rows = whole[: self.n * (wide + gap)].reshape(self.n, wide + gap)[:, :wide]
        return rows.reshape(self.shape(name, wide)) if gap == 0 else rows

    def spoil(self):
        """Makes one thing wrong, or perhaps right still. What it was."""
        pick = self.pick
        kind = pick.choice(["number", "no number", "packing", "tensor", "no tensor", "out", "framework"])
        if kind == "number":
            self.numbers[pick.randrange(4)] = pick.choice(ODD)
        elif kind == "no number":
            self.numbers[pick.randrange(4)] = pick.choice(NO_NUMBERS)
        elif kind == "packing":
            self.named = pick.choice(["", "flat", "INTERLEAVED", "\ud800", "a\0b", 3, None, b"flat"])
        elif kind == "out":
            self.gives_out, self.is_operator = True, False
            self.out = pick.choice(
                [self.out[:-1], [*self.out, self.out[0]], 3, "out", (), iter(self.out), {}]
            )
        else:
            tensors = pick.choice([self.read, self.out])
            self.gives_out |= tensors is self.out
            i = pick.randrange(len(tensors))
            if kind == "no tensor":
                tensors[i] = pick.choice(NO_TENSORS)
            elif kind == "framework":
                other = np.asarray(tensors[i]) if self.is_torch else torch.as_tensor(tensors[i])
                tensors[i] = other
            else:
                tensors[i] = self.changed(tensors[i])
        return kind

    def changed(self, one):
        pick = self.pick
        common = [
            lambda: one[:-1],
            lambda: one[..., :-1],
            lambda: one[..., ::2],
            lambda: one[None],
            lambda: one[None, None, None],
            lambda: one[0],
            lambda: one.T if isinstance(one, np.ndarray) else one.movedim(0, -1),
            lambda: pick.choice(self.read),
            lambda: pick.choice(self.out),
        ]
        of_torch = [
            lambda: one.to(torch.complex64),
            lambda: one.double(),
            lambda: one.to("meta"),
            lambda: one.float().requires_grad_(),
            lambda: one.to_sparse(),
            lambda: freed(one),
            lambda: one.as_subclass(type("Mine", (torch.Tensor,), {})),
            lambda: one.float().unsqueeze(0).expand(2**30, *one.shape),
            lambda: torch._neg_view(one.float()),
        ]
        of_numpy = [
            lambda: one.astype(">f8"),
            lambda: one.astype(object),
            lambda: np.ma.MaskedArray(one),
            lambda: np.broadcast_to(one[:1], (2**30, *one.shape[1:])),
            lambda: one[::-1],
            lambda: one.view("V1") if one.itemsize == 1 and one.flags.c_contiguous else one[:, :0],
        ]
        try:
            return pick.choice(common + (of_torch if self.is_torch else of_numpy))()
        except (IndexError, RuntimeError, ValueError):  # no rows, or a dtype that has no such thing
            return None

    def __call__(self):
        if self.is_operator:
            operator = getattr(torch.ops.gdn, self.name)
            if self.gives_out:
                operator.out(*self.read, *self.numbers, self.named, **dict(zip(self.out_names, self.out)))
                return tuple(self.out)
            return tuple(operator(*self.read, *self.numbers, self.named))
        out = dict(out=tuple(self.out) if isinstance(self.out, list) else self.out) if self.gives_out else {}
        return getattr(gdn, self.name)(*self.read, *self.numbers, self.named, **out)

    def packed_and_parts(self, got):
        return (self.read, got) if self.name == "split" else (got, self.read)


def flat(one):
    """An array's or a tensor's rows, as bits."""
    if isinstance(one, torch.Tensor):
        one = oracle.bits(one.detach()).numpy()
    array = np.array(one, order="C")
    return array.view(f"u{array.itemsize}").reshape(len(array), math.prod(array.shape[1:]))


def is_right(call, got):
    packed, parts = call.packed_and_parts(got)
    packed = [
        torch.from_numpy(flat(one).view(f"i{flat(one).itemsize}" if flat(one).itemsize > 1 else "u1"))
        for one in packed
    ]
    expected = oracle.split(*packed, *call.heads, call.packing)
    return all(
        flat(one).tobytes() == flat(other).tobytes() and len(one) == call.n
        for one, other in zip(parts, expected, strict=True)
    )


def remembered(call):
    tensors = (
        [one for one in call.out if isinstance(one, (torch.Tensor, np.ndarray))]
        if isinstance(call.out, list)
        else []
    )

    def has_bits(one):
        if isinstance(one, np.ndarray):
            return one.dtype != object and one.size < 2**24
        plain = type(one) is torch.Tensor and one.layout is torch.strided and one.device.type == "cpu"
        return plain and one.untyped_storage().nbytes() > 0 and one.numel() < 2**24 and not one.is_complex()

    return [(one, flat(one).copy()) for one in tensors if has_bits(one) and len(one.shape) >= 2]


def test_calls_at_random(request):
    number, seed = request.config.getoption("--fuzz"), request.config.getoption("--fuzz-seed")
    counts = {}
    for turn in range(number):
        pick = random.Random(f"{seed} {turn}")
        call = Call(pick)
        kind = call.spoil() if pick.random() < 0.75 else "right"
        before = remembered(call)
        try:
            got = call()
        except REFUSED as error:
            outcome = "refused"
            assert kind != "right", f"turn {turn}: {error}"
            assert NAMED.search(str(error)) or call.is_operator, (
                f"turn {turn} ({kind}): {error!r} names no argument"
            )
        except RuntimeError as error:
            outcome = "refused"
            # What functions hand to the operator ends as there: complex tensors, subclasses, gradients, views that are negated.
            assert kind == "tensor" or (kind != "right" and call.is_operator), (
                f"turn {turn} ({kind}): {error!r}"
            )
            assert kind != "tensor" or NAMED.search(str(error)), f"turn {turn}: {error!r} names no argument"
        else:
            outcome = "done"
            # What was spoiled may be right still, with another number of rows; on meta there are no bits.
            tensors = [one for one in (*call.read, *got) if isinstance(one, torch.Tensor)]
            on_meta = [one.device.type == "meta" for one in tensors]
            assert all(on_meta) or not any(on_meta), f"turn {turn} ({kind}) mixed devices"
            is_as_long = all(len(one) == call.n for one in got)
            assert any(on_meta) or not is_as_long or is_right(call, got), f"turn {turn} ({kind}) is wrong"
        if outcome == "refused":
            for one, was in before:
                assert np.array_equal(flat(one), was), f"turn {turn} ({kind}) wrote"
        counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
    assert all(counts.get((kind, "refused")) for kind in ("number", "tensor", "out", "framework")), counts
    assert counts["right", "done"] > number // 8


WEIGHT = dict(heads=(2, 4, 8, 16), dim=0, projection=None, to="contiguous", block=1, group=1)


def test_weights_at_random(request):
    number, seed = request.config.getoption("--fuzz") // 4, request.config.getoption("--fuzz-seed")
    refused = 0
    for turn in range(number):
        pick = random.Random(f"weight {seed} {turn}")
        weight = oracle_numpy.packed(5, WEIGHT["heads"], pick.choice(["f4", "u1"]))[
            pick.randrange(2)
        ].T.copy()
        weight = torch.from_numpy(weight) if pick.random() < 0.5 else weight
        arguments = dict(WEIGHT)
        for _ in range(pick.randrange(3)):
            name = pick.choice(["weight", *arguments])
            if name == "weight" and isinstance(weight, (torch.Tensor, np.ndarray)) and weight.ndim == 2:
                changed = [weight[:-1], weight[None], weight.T, weight[:, ::2], weight[:, :0]]
                weight = pick.choice([*changed, *NO_TENSORS])
            elif name == "weight":
                continue
            elif name == "heads":
                heads = list(WEIGHT["heads"])
                heads[pick.randrange(4)] = pick.choice([*ODD, *NO_NUMBERS])
                arguments[name] = pick.choice([tuple(heads), heads, heads[:3], 3, None])
            else:
                arguments[name] = pick.choice([*ODD, *NO_NUMBERS, "qkvz", "ba", "interleaved"])
        try:
            got = gdn.repack_weight(weight, **arguments)
        except REFUSED as error:
            refused += 1
            assert NAMED.search(str(error)) or "size" in str(error), (
                f"turn {turn}: {error!r} names no argument"
            )
        else:
            assert got.shape == weight.shape and got.dtype == weight.dtype, f"turn {turn}"
    assert number // 8 < refused < number
