"""SGLang's layers with everything between their GEMMs in gdn: their own `forward`, backends and metadata, on a GPU their own kernels too.

Where there is no GPU, `sglang_kernels` stands in for the kernels. Everything is held to float64 as well.
"""

import logging

import peers
import pytest
import stand_ins

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="SGLang's kernels are Triton's")
pytest.importorskip("einops", reason="SGLang's kernels need it")

import functools
import importlib
import sys

import sglang_rig as rigs
from sglang_rig import off

import gdn
import gdn.integrations.sglang as integration
from gdn.integrations import UnknownEngine
from gdn.integrations.ops import VARIABLE

FOLDER = peers.folder("sglang")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"SGLang's files are not in {FOLDER}: run python tests/peers.py sglang"
)
PACKINGS = list(rigs.MODELS)
HEADS = {"cpu": (2, 4, 16, 16), "cuda": (4, 8, 128, 128)}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def imported():
    """SGLang's modules, imported once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        else:
            patch.delenv("TRITON_INTERPRET", raising=False)
        with stand_ins.engine(FOLDER, "sglang", rigs.REAL, rigs.given()):
            yield


@pytest.fixture
def sglang(imported, monkeypatch):
    monkeypatch.setenv(VARIABLE, "split,decode,verify,prefill")
    yield
    integration.uninstall()
    importlib.import_module(integration.REGISTRY).HookRegistry.reset()


@pytest.fixture
def calls(monkeypatch):
    """The calls of gdn that were made."""
    made = []
    for name in ("decode", "prefill"):
        function = getattr(gdn.Layer, name)

        @functools.wraps(function)
        def counted(*args, _name=name, _function=function, **options):
            made.append((_name, options))
            return _function(*args, **options)

        monkeypatch.setattr(gdn.Layer, name, counted)
    return made


def rig(packing, **how):
    return rigs.Rig(packing, how.pop("heads", HEADS[DEVICE]), device=DEVICE, **how)


def near(ours, theirs, exact, what):
    """gdn's is no further from float64 than SGLang's own, and both are near it."""
    mine, other = off(ours, exact), off(theirs, exact)
    assert other < 3e-2 and mine < max(1.05 * other, 3e-3), f"{what}: gdn {mine:.1e}, SGLang {other:.1e}"


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("state_dtype, gate", [(torch.float32, None), (torch.bfloat16, "sigmoid")])
def test_decode(sglang, calls, packing, state_dtype, gate):
    one = rig(packing, state_dtype=state_dtype, gate=gate)
    one.project(5)
    slots = [3, 1, -1, 7, -1]
    batch = one.step("DECODE", slots)
    expected = {r: one.exact(slot, slice(r, r + 1)) for r, slot in enumerate(slots) if slot >= 0}
    (theirs, before), (ours, after) = one.twice(batch, integration)
    assert [name for name, _ in calls] == ["decode"]
    for r, (y, windows, states) in expected.items():
        near(ours[r], theirs[r], y[0], "out")
        near(after[1][slots[r]], before[1][slots[r]], states[0], "state")
        assert torch.equal(after[0][slots[r]], before[0][slots[r]])
    assert not ours[2].any() and not ours[4].any()
    untouched = [slot for slot in range(9) if slot not in slots]
    assert torch.equal(after[1][untouched], before[1][untouched])
    assert torch.equal(after[0][untouched], before[0][untouched])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_verify(sglang, calls, packing, shared, tokens):
    one = rig(packing, tokens=tokens, shared=shared)
    slots = [4, -1, 2]
    one.project(3 * tokens)
    batch = one.step("TARGET_VERIFY", slots, torch.arange(4) * tokens)
    kept = one.conv.clone(), one.state.clone()
    (theirs, before), (ours, after) = one.twice(batch, integration)
    assert [name for name, _ in calls] == ["decode"]
    assert torch.equal(after[0], kept[0]) and torch.equal(after[1], kept[1])  # SGLang commits afterwards
    one.conv.copy_(kept[0])
    for r in (0, 2):
        y, windows, states = one.exact(slots[r], slice(r * tokens, (r + 1) * tokens))
        for t in range(tokens):
            near(ours[r * tokens + t], theirs[r * tokens + t], y[t], "out")
            near(after[2][r, t], before[2][r, t], states[t], "state")
            assert torch.equal(after[3][r, t].double().cpu(), windows[t])
            assert torch.equal(after[3][r, t], before[3][r, t])
    assert not ours[tokens : 2 * tokens].any() and not after[2][1].any()


EXTENDS = [
    pytest.param([5, 1, 70, 9] if DEVICE == "cpu" else [5, 1, 700, 130], [0, 8, 64, 0], id="mixed"),
    pytest.param([64], [64], id="a whole chunk"),
]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("lengths, prefixes", EXTENDS)
def test_extend(sglang, calls, packing, lengths, prefixes):
    one = rig(packing)
    slots = [4, 6, 2, 0][: len(lengths)]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    one.project(starts[-1])
    for slot, prefix in zip(slots, prefixes, strict=True):
        if prefix == 0:  # SGLang clears slots for sequences that begin
            one.state[slot] = 0
    prefixes = torch.tensor(prefixes, device=DEVICE)
    batch = one.step("EXTEND", slots, starts, extend_prefix_lens=prefixes)
    exact = [
        one.exact(slot, slice(starts[r], starts[r + 1]), prefixes[r] == 0) for r, slot in enumerate(slots)
    ]
    (theirs, before), (ours, after) = one.twice(batch, integration)
    assert [name for name, _ in calls] == ["prefill"]
    for r, (y, windows, states) in enumerate(exact):
        near(ours[starts[r] : starts[r + 1]], theirs[starts[r] : starts[r + 1]], y, "out")
        near(after[1][slots[r]], before[1][slots[r]], states[-1], "state")
        assert torch.equal(after[0][slots[r]].double().cpu(), windows[-1])
        assert torch.equal(after[0][slots[r]], before[0][slots[r]])


@pytest.mark.parametrize("packing", PACKINGS)
def test_extend_with_states_for_the_prefix_cache(sglang, calls, packing, monkeypatch):
    """Rows 0 and 2 are tracked: at a whole chunk, where the state is the last; and inside, where it is a checkpoint."""
    one = rig(packing)
    slots, kept, starts = [4, 6, 2], [7, 8], [0, 64, 69, 200]
    one.project(200)
    prefixes = torch.tensor([64, 3, 5], device=DEVICE)
    ends = [64, 128]  # what is kept of rows 0 and 2
    places = torch.tensor([[s + e - 3 + j for j in range(3)] for s, e in zip((0, 69), ends)], device=DEVICE)
    index = lambda *numbers: torch.tensor(numbers, device=DEVICE)
    batch = one.step(
        "EXTEND",
        slots,
        starts,
        extend_prefix_lens=prefixes,
        has_mamba_track_mask=True,
        track_conv_indices=places,
        conv_states_mask_indices=index(*kept),
        track_ssm_h_src=index(1 + 1 + 2),
        track_ssm_h_dst=index(kept[1]),
        track_ssm_final_src=index(slots[0]),
        track_ssm_final_dst=index(kept[0]),
    )
    one.backend.forward_metadata.conv_states_mask_indices = index(*kept)
    monkeypatch.setattr(type(one.backend), "mamba_chunk_size", 64)
    exact = {slot: one.exact(slot, slice(starts[r], starts[r + 1])) for r, slot in enumerate(slots)}
    (theirs, before), (ours, after) = one.twice(batch, integration)
    assert calls[0][1]["checkpoint_every_n_tokens"] == 64
    for slot, of, end in zip(kept, (4, 2), ends, strict=True):
        _, windows, states = exact[of]
        assert torch.equal(after[0][slot].double().cpu(), windows[end - 1])
        assert torch.equal(after[0][slot], before[0][slot])
        near(after[1][slot], before[1][slot], states[end - 1], "state")


def test_rows_of_padding_behind_a_prefill(sglang, calls):
    one = rig("contiguous")
    one.project(20)
    prefixes = torch.tensor([0, 0], device=DEVICE)
    one.state[:2] = 0
    batch = one.step(
        "EXTEND", [0, 1], [0, 5, 13], extend_prefix_lens=prefixes, global_num_token_non_padded_cpu=13
    )
    batch.out_cache_loc = torch.zeros(20)
    (theirs, _), (ours, _) = one.twice(batch, integration)
    assert len(calls) == 1 and not ours[13:].any() and off(ours[:13], theirs[:13]) < 2e-2


@pytest.mark.parametrize("padded", [0, 3])
def test_a_graph_with_padding(sglang, padded):
    """As SGLang replays its graphs: slots in a buffer that is filled before each replay, -1 behind those there are."""
    if DEVICE == "cpu":
        pytest.skip("graphs are CUDA's")
    one = rig("contiguous")
    one.project(6)
    slots = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    batch = one.step("DECODE", slots)
    slots = one.backend.forward_metadata.mamba_cache_indices
    now = torch.tensor([3, 1, 5, 7, 2, 6], dtype=torch.int32, device=DEVICE)
    now[6 - padded :] = -1
    kept = one.conv.clone(), one.state.clone()
    with integration.installed():
        one.run(batch)  # kernels are loaded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = one.run(batch)
    one.conv.copy_(kept[0])
    one.state.copy_(kept[1])
    slots.copy_(now)
    with integration.installed():
        expected = one.run(batch).clone(), one.conv.clone(), one.state.clone()
    one.conv.copy_(kept[0])
    one.state.copy_(kept[1])
    graph.replay()
    assert all(map(torch.equal, (out, one.conv, one.state), expected))
    assert padded == 0 or not out[6 - padded :].any()


# What is left to SGLang


def left(one, batch, calls):
    with integration.installed():
        one.run(batch)
    assert calls == []


def test_only_the_ops_that_are_named(sglang, calls, monkeypatch):
    one = rig("contiguous")
    one.project(2)
    monkeypatch.setenv(VARIABLE, "split, prefill")
    left(one, one.step("DECODE", [1, 2]), calls)
    monkeypatch.setenv(VARIABLE, "decode")
    with integration.installed():
        one.run(one.step("DECODE", [1, 2]))
    assert [name for name, _ in calls] == ["decode"]


def test_without_the_variable(sglang, calls, monkeypatch):
    """Decode, drafts and prompts."""
    monkeypatch.delenv(VARIABLE)
    one = rig("contiguous", tokens=4)
    for steps, starts, expected in [
        ("DECODE", [0, 1], "decode"),
        ("TARGET_VERIFY", [0, 4], "decode"),
        ("EXTEND", [0, 4], "prefill"),
    ]:
        one.project(starts[-1])
        prefixes = (
            {"extend_prefix_lens": torch.zeros(1, dtype=torch.int32, device=DEVICE)}
            if steps == "EXTEND"
            else {}
        )
        with integration.installed():
            one.run(one.step(steps, [1], starts, **prefixes))
        assert [name for name, _ in calls] == [expected]
        calls.clear()


def test_a_name_that_is_no_op(sglang, monkeypatch):
    monkeypatch.setenv(VARIABLE, "decode,encode")
    with pytest.raises(ValueError, match="'encode', it may name split, decode, verify, prefill"):
        integration.install()
    assert not integration.is_installed()


def hooked(one, backends, monkeypatch):
    one.layer.norm.register_forward_hook(lambda *_: None)


def grouped(one, backends, monkeypatch):
    one.layer.norm.group_size = 16


def scoring(one, backends, monkeypatch):
    one.backend.mis_metadata = object()


def replayed(one, backends, monkeypatch):
    one.backend.forward_metadata.replayssm_write_pos = object()


def other_backend(one, backends, monkeypatch):
    one.backend.__class__ = type("Other", (type(one.backend),), {})


def in_graph_of_prefill(one, backends, monkeypatch):
    graphs = importlib.import_module("sglang.srt.model_executor.runner_utils.prefill_graph")
    monkeypatch.setattr(graphs, "is_in_prefill_graph_scope", rigs.yes)


CHANGES = [hooked, grouped, scoring, replayed, other_backend, in_graph_of_prefill]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_it_is_known(sglang, calls, change, monkeypatch):
    one = rig("contiguous")
    one.project(4)
    if change is in_graph_of_prefill:
        batch = one.step("EXTEND", [1], [0, 4], extend_prefix_lens=torch.tensor([0]))
    else:
        batch = one.step("DECODE", [1, 2, 3, 4])
    change(one, importlib.import_module(rigs.BACKEND), monkeypatch)
    reached = []
    own = rigs.importlib.import_module("sglang.srt.layers.radix_linear_attention").RadixLinearAttention
    one.layer.attn.forward = lambda batch, **given: reached.append(given) or attention(one, **given)
    assert type(one.layer.attn) is own
    left(one, batch, calls)
    assert len(reached) == 1


def attention(one, mixed_qkv, a, b):
    """Zeros, with a gate where the projections came packed."""
    hv, dv = one.heads[1::2]
    core = torch.zeros(1, one.projections[0].shape[0], hv, dv, dtype=one.dtype, device=one.device)
    return (core, core[0]) if isinstance(mixed_qkv, tuple) else core


def test_drafts_that_are_trees(sglang, calls):
    one = rig("contiguous")
    one.project(4)
    batch = one.step("TARGET_VERIFY", [1], [0, 4], retrieve_parent_token=torch.zeros(1, 4))
    one.layer.attn.forward = lambda batch, **given: attention(one, **given)
    left(one, batch, calls)


def test_what_gdn_does_not_support_is_the_engine_s(sglang, calls, caplog):
    """17 draft tokens are one too many: SGLang's own runs, on the projections that there are."""
    one = rig("contiguous", tokens=17, heads=(1, 2, 16, 16) if DEVICE == "cpu" else HEADS[DEVICE])
    one.project(17)
    projected = []
    own = one.layer._forward_input_proj
    one.layer._forward_input_proj = lambda hidden: projected.append(1) or own(hidden)
    batch = one.step("TARGET_VERIFY", [1], [0, 17])
    with caplog.at_level(logging.INFO):
        (theirs, _), (ours, _) = one.twice(batch, integration)
    assert calls == [] and torch.equal(theirs, ours) and len(projected) == 2  # once each
    assert any("gdn leaves verify to the engine" in record.getMessage() for record in caplog.records)


def test_weights_that_are_exchanged(sglang):
    one = rig("contiguous")
    one.project(2)
    batch = one.step("DECODE", [1, 2])
    with integration.installed():
        before = one.run(batch)
        one.layer.norm.weight = torch.nn.Parameter(
            torch.zeros_like(one.layer.norm.weight), requires_grad=False
        )
        after = one.run(batch)
    assert before.any() and not after.any()


# On and off


@pytest.mark.parametrize("first", ["model", "gdn"])
def test_hooks_come_and_go(sglang, monkeypatch, first):
    module, name = rigs.MODELS["contiguous"]
    importlib.import_module(module)
    if first == "gdn":
        monkeypatch.delitem(sys.modules, module)
    registry = importlib.import_module(integration.REGISTRY).HookRegistry
    if first == "model":
        original = getattr(importlib.import_module(module), name).forward
    integration.install()
    cls = getattr(importlib.import_module(module), name)
    assert f"{module}.{name}.forward" in registry._patched
    assert cls.forward.__wrapped__.__qualname__ == f"{name}.forward"
    if first == "model":
        assert cls.forward.__wrapped__ is original
    original = cls.forward.__wrapped__
    integration.uninstall()
    assert cls.forward is original and not registry._hooks and not registry._patched


def test_a_model_that_comes_after_uninstall(sglang, monkeypatch):
    importlib.import_module(rigs.MODELS["contiguous"][0])
    monkeypatch.delitem(sys.modules, rigs.MODELS["contiguous"][0])
    integration.install()
    integration.uninstall()
    module, name = rigs.MODELS["contiguous"]
    assert not hasattr(getattr(importlib.import_module(module), name).forward, "__wrapped__")


def test_beside_another_plugin_s_hook(sglang):
    """Somebody else's hook on the same method, there first: refused whole, and theirs stays."""
    registry = importlib.import_module(integration.REGISTRY)
    module, name = rigs.MODELS["contiguous"]
    target = f"{module}.{name}.forward"
    importlib.import_module(module)
    registry.HookRegistry.register(
        target, lambda original, *given: original(*given), registry.HookType.AROUND
    )
    with pytest.raises(UnknownEngine, match="another plugin has hooks"):
        integration.install()
    assert not integration.is_installed() and list(registry.HookRegistry._hooks) == [target]


def test_a_changed_layer_is_refused(sglang, monkeypatch):
    module, name = rigs.MODELS["contiguous"]
    cls = getattr(importlib.import_module(module), name)

    def forward(self, hidden_states, forward_batch):
        return None

    monkeypatch.setattr(cls, "forward", forward)
    with pytest.raises(UnknownEngine, match=f"does not know this {name}.forward"):
        integration.install()
    registry = importlib.import_module(integration.REGISTRY).HookRegistry
    assert cls.forward is forward and not registry._hooks


def test_a_changed_backend_is_left_alone(sglang, calls, caplog, monkeypatch):
    one = rig("contiguous")
    one.project(2)
    monkeypatch.setattr(type(one.backend), "forward_decode", lambda self, **how: None)
    one.layer.attn.forward = lambda batch, **given: attention(one, **given)
    left(one, one.step("DECODE", [1, 2]), calls)
    assert any("gdn leaves everything" in record.getMessage() for record in caplog.records)
