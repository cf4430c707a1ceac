"""Decode and prefill at random, right calls and wrong ones, as `test_fuzz` has split and merge: right ones are held to float64, wrong ones
end with a sentence that names an argument, and have written nothing.

`pytest tests/test_fuzz_layer.py --fuzz 100000` for more of them, `--fuzz-seed` for others.
"""

from __future__ import annotations

import itertools
import random
import re

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

import oracle_layer as ol
from test_fuzz import NO_NUMBERS, NO_TENSORS, ODD, REFUSED, flat, freed

import gdn

WEIGHTS = ("conv_weight", "conv_bias", "A_log", "dt_bias", "norm_weight")
STATES = ("conv_state", "recurrent_state")
PROJECTIONS = (("mixed_qkvz", "mixed_ba"), ("mixed_qkv", "z", "b", "a"))
#: What else each op takes, tensors and numbers.
TENSORS = {
    "decode": (
        "state_indices",
        "num_accepted_tokens",
        "output_state_indices",
        "intermediate_states",
        "intermediate_conv_windows",
        "intermediate_state_indices",
    ),
    "prefill": (
        "state_indices",
        "has_initial_state",
        "checkpoint_starts",
        "state_checkpoints",
        "conv_checkpoints",
    ),
}
NUMBERS = {
    "decode": ("tokens_per_sequence", "pad_slot_id"),
    "prefill": ("checkpoint_every_n_tokens", "pad_slot_id"),
}
FACTORS = ("l2norm_eps", "norm_eps", "scale", "beta_scale")
HEADS = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "heads")
WRITTEN = (
    *STATES,
    "out",
    "intermediate_states",
    "intermediate_conv_windows",
    "state_checkpoints",
    "conv_checkpoints",
)
NAMED = re.compile(
    "|".join(
        [
            *WEIGHTS,
            *itertools.chain(STATES, *PROJECTIONS, *TENSORS.values(), *NUMBERS.values(), FACTORS, HEADS),
            "out",
            "cu_seqlens",
            "packing",
            "gate",
            "projections",
            "conv_width",
            "number of rows",
        ]
    )
)


class Call:
    """The arguments of a decode or prefill, right at first."""

    def __init__(self, pick: random.Random):
        self.pick = pick
        hk = pick.randint(1, 2)
        self.heads = (hk, hk * pick.randint(1, 3), pick.choice([8, 16]), pick.choice([8, 16]))
        self.op, self.door = (
            pick.choice(["decode", "prefill"]),
            pick.choice(["function", "operator", "numpy"]),
        )
        dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (self.door != "numpy")
        self.numbers = ol.Numbers(self.heads, pick.choice(["interleaved", "contiguous"]))
        self.weights = ol.weights(self.heads, bias=pick.random() < 0.5)
        self.conv, self.state = ol.states(
            9, self.heads, pick.choice(["dense", "channels last", "page", "wide"])
        )
        batch = pick.randint(0, 3)
        self.lengths = [pick.randint(1, 3)] * batch
        self.options: dict[str, object] = {}
        if self.op == "decode":
            self.options |= dict(tokens_per_sequence=self.lengths[0] if batch else 1)
        else:
            self.lengths = [pick.choice([0, 1, 5, 17, 33]) for _ in range(batch)]
        self.cu = [0, *itertools.accumulate(self.lengths)]
        kind = pick.choice(["packed", "unpacked", "flat"])
        self.projections = list(ol.projections(self.cu[-1], self.numbers, kind, pick.choice(dtypes)))
        self.slots = pick.sample(range(9), batch)
        if batch and pick.random() < 0.3:
            self.slots[0] = -1
        self.options |= dict(
            state_indices=torch.tensor(self.slots, dtype=pick.choice([torch.int32, torch.int64]))
        )
        self.cu_seqlens = torch.tensor(self.cu, dtype=pick.choice([torch.int32, torch.int64]))
        self.out = None
        if pick.random() < 0.6:
            self.out = torch.full((self.cu[-1], *self.heads[1::2]), 7.0, dtype=pick.choice(dtypes))
        self.factors: dict[str, object] = {}
        self.before = self.conv.clone(), self.state.clone()
        self.is_right = True

    def tensors(self):
        """Who has each of them, and by which name or number."""
        yield from ((self.projections, i) for i in range(len(self.projections)))
        yield from ((vars(self.weights), name) for name in WEIGHTS)
        yield from ((vars(self), name) for name in ("conv", "state", "out", "cu_seqlens"))
        yield from ((self.options, name) for name in TENSORS[self.op])

    def has(self, where, at):
        return where is self.projections or where.get(at) is not None

    def spoil(self):
        """Makes one thing wrong, or perhaps right still. What it was."""
        pick = self.pick
        self.is_right = False
        kind = pick.choice(
            ["number", "factor", "tensor", "tensor", "no tensor", "indices", "more", "framework"]
        )
        if kind == "number":
            where, name = pick.choice([(self.options, name) for name in NUMBERS[self.op]] + [(None, None)])
            number = pick.choice([*ODD, *NO_NUMBERS, 16, 17])
            if where is not None:
                where[name] = number
            else:
                heads = list(self.heads)
                heads[pick.randrange(4)] = number
                self.numbers.heads = tuple(heads)
        elif kind == "factor":
            name = pick.choice([*FACTORS, "gate", "packing"])
            wrong = (
                ["", "tanh", 3, None]
                if name in ("gate", "packing")
                else [float("nan"), float("inf"), -1.0, "1"]
            )
            setattr(self.numbers, name, pick.choice(wrong))
        elif kind == "indices":
            name = pick.choice(["state_indices", "cu_seqlens"] if self.op == "prefill" else ["state_indices"])
            where = vars(self) if name == "cu_seqlens" else self.options
            values = [-(2**31), -2, -1, 0, 1, 8, 9, 2**31 - 1]
            shape = pick.choice([where[name].shape, (len(self.lengths), 3), (len(self.lengths) + 1,)])
            count = torch.Size(shape).numel()
            where[name] = torch.tensor([pick.choice(values) for _ in range(count)], dtype=torch.int32).view(
                shape
            )
        elif kind == "more":
            self.add(pick.choice(TENSORS[self.op][1:]))
        else:
            where, at = pick.choice([(where, at) for where, at in self.tensors() if self.has(where, at)])
            if kind == "no tensor":
                where[at] = pick.choice(NO_TENSORS)
            elif kind == "framework":
                where[at] = Other(where[at])
            else:
                where[at] = self.changed(where[at])
        return kind

    def add(self, name):
        """One more tensor, of about the right shape."""
        pick, (_, hv, dk, dv), batch = self.pick, self.heads, len(self.lengths)
        slots, tokens = pick.choice([0, batch, 9]), pick.choice([1, 3, 16])
        some = {
            "intermediate_states": (slots, tokens, hv, dv, dk),
            "intermediate_conv_windows": (slots, tokens, ol.channels(self.heads), pick.choice([2, 3, 4])),
            "state_checkpoints": (slots, hv, dv, dk),
            "conv_checkpoints": (slots, ol.channels(self.heads), 3),
        }
        if name in some:
            self.options[name] = torch.full(some[name], 7.0)
        else:
            entries = [pick.choice([-1, 0, 1, 2, 8, 9]) for _ in range(pick.choice([batch, batch + 1]))]
            self.options[name] = torch.tensor(entries, dtype=torch.int32)
        if self.op == "prefill":
            self.options["checkpoint_every_n_tokens"] = pick.choice([0, 64, 128, 16])
            self.options["segments"] = pick.choice([False, True])

    def changed(self, one):
        pick = self.pick
        others = [where[at] for where, at in self.tensors() if self.has(where, at)]
        changes = [
            lambda: one[:-1],
            lambda: one[..., :-1],
            lambda: one[..., ::2],
            lambda: one[None],
            lambda: one[None, None, None],
            lambda: one[0],
            lambda: one.movedim(0, -1),
            lambda: one.transpose(-1, -2),
            lambda: pick.choice(others),
            lambda: one.to(torch.complex64),
            lambda: one.double(),
            lambda: one.long(),
            lambda: one.to("meta"),
            lambda: one.float().requires_grad_(),
            lambda: one.to_sparse(),
            lambda: freed(one),
            lambda: one.as_subclass(type("Mine", (torch.Tensor,), {})),
            lambda: one.float().unsqueeze(0).expand(2**30, *one.shape),
            lambda: one[:1].expand(2**40, *one.shape[1:]),
            lambda: one[:1].expand(len(one), *one.shape[1:]),
            lambda: torch._neg_view(one.float()),
            lambda: one.new_empty(0),
            lambda: torch.as_strided(one, one.shape, [1] * one.dim()),
        ]
        try:
            return pick.choice(changes)()
        except (IndexError, RuntimeError, ValueError):  # no rows, or a dtype that has no such thing
            return None

    def given(self, one):
        """What the door takes: NumPy's arrays, or PyTorch's tensors."""
        if isinstance(one, Other):
            one, is_numpy = one.one, self.door != "numpy"
        else:
            is_numpy = self.door == "numpy"
        if is_numpy and type(one) is torch.Tensor:
            try:
                return one.numpy()
            except (RuntimeError, TypeError):  # no memory, sparse, bfloat16, gradients
                return one
        return one

    def __call__(self):
        weights = [self.given(one) for one in vars(self.weights).values()]
        projections = tuple(map(self.given, self.projections))
        conv, state, out, cu = map(self.given, (self.conv, self.state, self.out, self.cu_seqlens))
        options = {name: self.given(one) for name, one in self.options.items()}
        states = (conv, state, cu) if self.op == "prefill" else (conv, state)
        numbers = vars(self.numbers)
        if self.door == "operator":
            op = getattr(torch.ops.gdn, self.op)
            factors = {name: numbers[name] for name in (*FACTORS, "gate")}
            arguments = (*projections, *weights, *states, *self.numbers.heads, numbers["packing"])
            packed = len(projections) == 2
            if out is None:
                return (op.default if packed else op.unpacked)(*arguments, **factors, **options)
            (op.out if packed else op.unpacked_out)(*arguments, **factors, **options, out=out)
            return out
        layer = ol.layer(self.numbers, ol.Weights(*weights))
        if self.op == "prefill":
            return layer.prefill(projections, cu, conv, state, out=out, **options)
        return layer.decode(projections, conv, state, out=out, **options)

    def check(self, got):
        """A right call's results against float64."""
        got = torch.as_tensor(got)
        parts = ol.unpacked(self.projections, self.numbers)
        for r, (start, end) in enumerate(itertools.pairwise(self.cu)):
            rows, slot = got[start:end], self.slots[r]
            if slot < 0:
                assert not rows.any()
            elif end > start:
                window, first = self.before[0][slot][:, -3:], self.before[1][slot]
                some = [one[start:end] for one in parts]
                y, windows, states = ol.sequence(self.numbers, self.weights, some, window, first)
                ol.close(rows, y)
                ol.close(self.state[slot], states[-1])
                assert torch.equal(self.conv[slot][:, -3:].double(), windows[-1])
        rest = [slot for slot in range(9) if slot not in self.slots]
        assert torch.equal(self.conv[rest], self.before[0][rest])
        assert torch.equal(self.state[rest], self.before[1][rest])

    def written(self):
        """What a call may write to, and its bits."""
        some = [vars(self)[name] for name in ("conv", "state", "out")]
        some += [self.options.get(name) for name in WRITTEN]
        some = [one.one if isinstance(one, Other) else one for one in some]

        def has_bits(one):
            plain = type(one) is torch.Tensor and one.layout is torch.strided and one.device.type == "cpu"
            return (
                plain and one.untyped_storage().nbytes() > 0 and one.numel() < 2**20 and not one.is_complex()
            )

        return [(one, flat(one.detach()).copy()) for one in some if has_bits(one) and one.dim() >= 2]


class Other:
    """A tensor that is given as another framework's than the rest."""

    def __init__(self, one):
        self.one = one


def test_calls_at_random(request):
    number, seed = request.config.getoption("--fuzz") // 8, request.config.getoption("--fuzz-seed")
    counts = {}
    for turn in range(number):
        pick = random.Random(f"layer {seed} {turn}")
        torch.manual_seed(pick.randrange(2**31))
        call = Call(pick)
        kind = call.spoil() if pick.random() < 0.8 else "right"
        before = call.written()
        what = f"turn {turn} ({kind}, {call.door} {call.op})"
        try:
            got = call()
        except REFUSED as error:
            outcome = "refused"
            assert kind != "right", f"{what}: {error}"
            assert NAMED.search(str(error)) or call.door == "operator", f"{what}: {error!r} names no argument"
        except RuntimeError as error:
            outcome = "refused"
            # What functions hand to the operator ends as there: subclasses, gradients, views that are negated.
            assert call.door == "operator" or kind == "tensor", f"{what}: {error!r}"
            assert kind in ("no tensor", "number", "factor") or NAMED.search(str(error)), (
                f"{what}: {error!r} names no argument"
            )
        else:
            outcome = "done"
            if call.is_right:
                call.check(got)
        if outcome == "refused":
            for one, was in before:
                assert np.array_equal(flat(one.detach()), was), f"{what} wrote"
        counts[kind, outcome] = counts.get((kind, outcome), 0) + 1
    wrong = ("number", "factor", "tensor", "no tensor", "indices", "more", "framework")
    assert all(counts.get((kind, "refused")) for kind in wrong), counts
    assert counts["right", "done"] > number // 8


def test_what_is_supported_at_random(request):
    """`*_supported` never raises for what a call's tensors are, and what it refuses the call refuses."""
    number, seed = request.config.getoption("--fuzz") // 16, request.config.getoption("--fuzz-seed")
    agreed = 0
    for turn in range(number):
        pick = random.Random(f"supported {seed} {turn}")
        torch.manual_seed(pick.randrange(2**31))
        call = Call(pick)
        call.door = "function"
        kind = call.spoil() if pick.random() < 0.7 else "right"
        try:
            layer = ol.layer(call.numbers, ol.Weights(*map(call.given, vars(call.weights).values())))
        except REFUSED:
            continue
        options = {name: call.given(one) for name, one in call.options.items()}
        options["out"] = call.given(call.out)
        given = [tuple(map(call.given, call.projections))]
        given += [call.given(call.cu_seqlens)] * (call.op == "prefill")
        given += [call.given(call.conv), call.given(call.state)]
        reason = getattr(gdn, f"{call.op}_supported")(layer, *given, **options)
        assert reason is None or (isinstance(reason, str) and kind != "right"), (
            f"turn {turn} ({kind}): {reason}"
        )
        if reason is not None:
            agreed += 1
            assert NAMED.search(reason), f"turn {turn} ({kind}): {reason} names no argument"
    assert agreed > number // 8
