"""vLLM's layer on CUDA with everything between its GEMMs in gdn: steps as vLLM makes them, held to float64, and on a GPU to vLLM's own kernels.

Where there is no GPU the same steps run on the CPU, against float64 alone.
"""

import importlib
import logging
from types import SimpleNamespace

import peers
import pytest
import stand_ins

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="vLLM's layer imports it")
pytest.importorskip("einops", reason="vLLM's layer imports it")
pytest.importorskip("triton", reason="vLLM's kernels are Triton's")

import vllm_rig as rigs

import gdn
import gdn.integrations.vllm as integration
import gdn.integrations.vllm_cuda as cuda
from gdn.integrations import vllm_cuda_trial as trial
from gdn.integrations.ops import OPS, VARIABLE
from gdn.integrations.vllm_cuda_trial import Bench, Step

FOLDER = peers.folder("vllm")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"vLLM's files are not in {FOLDER}: run python tests/peers.py vllm"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = (4, 8, 128, 128) if DEVICE == "cuda" else (2, 4, 16, 16)
LONG = 700 if DEVICE == "cuda" else 70


@pytest.fixture(scope="module")
def imported():
    with stand_ins.engine(FOLDER, "vllm", rigs.REAL, rigs.given()):
        yield importlib.import_module(rigs.MODULE)


@pytest.fixture
def vllm(imported, monkeypatch):
    monkeypatch.setenv(VARIABLE, ",".join(OPS))
    yield imported
    integration.uninstall()


def off(got, right):
    return ((got.double().cpu() - right.double().cpu()).norm() / right.double().cpu().norm()).item()


def methods(module, ops=OPS, found=None):
    """vLLM's own method, and gdn's in its place after a trial that found this."""
    own = getattr(module.QwenGatedDeltaNetAttention, cuda.METHOD)
    return own, cuda.core_packed(own, module, ops, logging.getLogger("test"), lambda *given: found)


def bench_of(step, dtype=torch.float32, **layer):
    like = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    return Bench(rigs.layer(layer.pop("heads", HEADS), **layer), step, like, dtype)


def check(bench, calls=None):
    """The step through gdn is as near to float64 as it can be, and where there is a GPU no further than vLLM's own."""
    module = importlib.import_module(rigs.MODULE)
    own, ours = methods(module)
    step = bench.step
    right = {r: rigs.exact(bench, r) for r, slot in enumerate(step.slots) if slot}
    before = [one.clone() for one in bench.layer.kv_cache]
    out, conv, state = bench.run(ours)
    theirs = (
        bench.run(lambda layer, *given: _theirs(module, own, layer, *given)) if DEVICE == "cuda" else None
    )

    def near(got, expected, other, bound, what):
        worst = bound if other is None else max(bound, 1.05 * off(other, expected))
        assert worst < 3e-2, f"{what}: vLLM's own is off by {worst:.1e}"
        assert off(got, expected) < worst, f"{what}: {off(got, expected):.1e}, bound {worst:.1e}"

    conv = conv.transpose(1, 2)
    named = {0}
    for r, (y, windows, states) in right.items():
        first = sum(step.tokens[:r])
        rows, slots = slice(first, first + step.tokens[r]), bench.slots_of(r)
        near(out[rows], y, None if theirs is None else theirs[0][rows], 4e-3, "out")
        if r < step.drafts:
            named.update(slots)
            for t, slot in enumerate(slots):
                near(state[slot], states[t], None if theirs is None else theirs[2][slot], 2e-3, "state")
            begin = step.accepted[r] - 1
            kept = before[0].transpose(1, 2)[slots[0], :, begin + 1 : begin + 3].double().cpu()
            inputs = torch.stack([one[:, -1] for one in windows], 1)
            assert torch.equal(conv[slots[0]].double().cpu(), torch.cat([kept, inputs], 1))
        else:
            named.add(slots[0])
            near(state[slots[0]], states[-1], None if theirs is None else theirs[2][slots[0]], 2e-3, "state")
            assert torch.equal(conv[slots[0], :, :3].double().cpu(), windows[-1])
        if theirs is not None:
            width = 3 if r >= step.drafts else conv.shape[2]
            assert torch.equal(conv[slots[0], :, :width], theirs[1].transpose(1, 2)[slots[0], :, :width])
    for r, slot in enumerate(step.slots):
        if slot == 0:
            assert not out[r].any()
    rest = [slot for slot in range(1, state.shape[0]) if slot not in named]
    assert torch.equal(state[rest], before[1][rest])
    assert torch.equal(conv[rest], before[0].transpose(1, 2)[rest])


def _theirs(module, own, layer, mixed_qkvz, ba, out):
    if not layer.gqa_interleaved_layout:
        return own(layer, mixed_qkvz, ba, out)
    heads = (layer.num_k_heads // layer.tp_size, layer.num_v_heads // layer.tp_size)
    mixed_qkv, z, b, a = gdn.split(mixed_qkvz, ba, *heads, layer.head_k_dim, layer.head_v_dim)
    return layer._forward_core_fused_norm(mixed_qkv, b, a, z, out)


STEPS = {
    "decode": Step(tokens=(1, 1, 1, 1), slots=(3, 1, 0, 4), decodes=4),
    "prefill": Step(tokens=(LONG, 5, 64), slots=(2, 4, 1), fresh=(0, 2)),
    "mixed": Step(tokens=(1, 1, 9, LONG, 1), slots=(3, 1, 5, 2, 4), decodes=2, fresh=(2,)),
    "drafts": Step(tokens=(4, 4, 4), slots=(3, 1, 2), drafts=3, accepted=(1, 4, 2)),
    "drafts beside": Step(tokens=(4, 4, 1, 33), slots=(3, 1, 5, 2), drafts=2, accepted=(2, 3), fresh=(3,)),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_a_step(vllm, name, interleaved):
    num_spec = 3 if "drafts" in name else 0
    check(bench_of(STEPS[name], interleaved=interleaved, num_spec=num_spec))


@pytest.mark.parametrize("gate, dtype, tp_size", [("sigmoid", torch.float32, 1), ("silu", torch.bfloat16, 2)])
def test_gates_states_and_ranks(vllm, gate, dtype, tp_size):
    step = Step(tokens=(1, 1, 20), slots=(3, 1, 2), decodes=2, fresh=(2,), gate=gate)
    check(bench_of(step, dtype, tp_size=tp_size))


def test_one_token_of_an_engine_with_drafts(vllm):
    """Its windows have columns for drafts; a step without any uses the first three, as vLLM's does."""
    check(bench_of(STEPS["mixed"], num_spec=3))


def left_to_vllm(monkeypatch, bench, ops=OPS, found=None):
    """Whether the step goes to vLLM's own."""
    module, reached = importlib.import_module(rigs.MODULE), []
    monkeypatch.setattr(module.QwenGatedDeltaNetAttention, cuda.METHOD, lambda *given: reached.append(given))
    _, ours = methods(module, ops, found)
    bench.run(ours)
    return bool(reached)


def test_only_the_ops_that_are_named(vllm, monkeypatch):
    assert not left_to_vllm(monkeypatch, bench_of(STEPS["decode"]), ("decode",))
    assert left_to_vllm(monkeypatch, bench_of(STEPS["mixed"]), ("decode",))
    assert left_to_vllm(monkeypatch, bench_of(STEPS["decode"]), ("prefill",))


def test_without_the_variable(vllm, monkeypatch):
    """All of them."""
    monkeypatch.delenv(VARIABLE)
    given = []
    monkeypatch.setattr(
        integration, "_put_core_on_cuda", lambda layer, own, ops: given.append(ops) or (lambda: None)
    )
    with integration.installed():
        (ops,) = given
    assert not left_to_vllm(monkeypatch, bench_of(STEPS["mixed"]), ops)
    assert not left_to_vllm(monkeypatch, bench_of(STEPS["drafts"], num_spec=3), ops)


def test_a_trial_that_fails(vllm, monkeypatch, caplog):
    assert left_to_vllm(monkeypatch, bench_of(STEPS["decode"]), found="the output is off")
    (line,) = [one.getMessage() for one in caplog.records]
    assert "leaves everything" in line and "the output is off" in line


@pytest.mark.parametrize(
    "name, change",
    [
        ("decode", dict(checkpoint=object())),
        ("mixed", dict(flashinfer_checkpoint_plan=object())),
        ("drafts", dict(uniform_spec_sequence_length=None)),
        ("drafts", dict(uniform_spec_sequence_length=2)),
        ("drafts", dict(num_actual_tokens=16)),
    ],
)
def test_what_is_left_to_vllm(vllm, monkeypatch, name, change):
    bench = bench_of(STEPS[name], num_spec=3 if name == "drafts" else 0)
    vars(bench.metadata).update(change)
    assert left_to_vllm(monkeypatch, bench)


@pytest.mark.parametrize("name", ["drafts", "drafts beside"])
def test_drafts_of_many_sequences_are_left_to_vllm(vllm, monkeypatch, name):
    heads = HEADS[1] * STEPS[name].drafts
    monkeypatch.setattr(cuda, "MOST_DRAFTED_HEADS", heads)
    assert not left_to_vllm(monkeypatch, bench_of(STEPS[name], num_spec=3))
    monkeypatch.setattr(cuda, "MOST_DRAFTED_HEADS", heads - 1)
    assert left_to_vllm(monkeypatch, bench_of(STEPS[name], num_spec=3))


@pytest.mark.parametrize(
    "change",
    [dict(in_proj_qkv=1), dict(activation="gelu"), dict(disable_tp_for_ba_proj=True, tp_size=2)],
)
def test_layers_that_are_left_to_vllm(vllm, change):
    layer = bench_of(STEPS["decode"]).layer
    assert cuda.left(layer) is None
    vars(layer).update(change)
    assert cuda.left(layer) is not None


# The trial


def wrong_slots(layer, projections, out, run):
    pages = [one.clone() for one in layer.kv_cache]
    run(out)
    for one, kept in zip(layer.kv_cache, pages, strict=True):
        one[3], one[1] = one[1].clone(), one[3].clone()


def no_states(layer, projections, out, run):
    pages = [one.clone() for one in layer.kv_cache]
    run(out)
    for one, kept in zip(layer.kv_cache, pages, strict=True):
        one.copy_(kept)


def wrong_rows(layer, projections, out, run):
    run(out)
    out.copy_(out.roll(1, 0))


def fails(layer, projections, out, run):
    raise KeyError("x")


@pytest.mark.parametrize("num_spec", [0, 3])
def test_the_trial_is_content(vllm, num_spec):
    """With vLLM's own kernels where there is a GPU; without one gdn's against gdn's."""
    own, ours = methods(vllm)
    theirs = own if DEVICE == "cuda" else ours
    like = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    assert trial.difference(rigs.layer(HEADS, num_spec=num_spec), theirs, ours, like) is None


@pytest.mark.parametrize("fault", [wrong_slots, no_states, wrong_rows, fails])
def test_the_trial_sees(vllm, fault):
    own, ours = methods(vllm)

    def faulty(layer, mixed_qkvz, ba, out):
        fault(layer, (mixed_qkvz, ba), out, lambda out: ours(layer, mixed_qkvz, ba, out))

    like = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    found = trial.difference(rigs.layer(HEADS), own if DEVICE == "cuda" else ours, faulty, like)
    assert found is not None and ("is off by" in found or "KeyError" in found)


# On and off


def test_on_and_off(vllm):
    cls = vllm.QwenGatedDeltaNetAttention
    before = {name: getattr(cls, name) for name in ("forward_cuda", "forward_cpu", cuda.METHOD)}
    with integration.installed():
        assert all(getattr(cls, name) is not one for name, one in before.items())
    assert all(getattr(cls, name) is one for name, one in before.items())


def test_split_alone(vllm, monkeypatch):
    monkeypatch.setenv(VARIABLE, "split")
    own = getattr(vllm.QwenGatedDeltaNetAttention, cuda.METHOD)
    with integration.installed():
        assert getattr(vllm.QwenGatedDeltaNetAttention, cuda.METHOD) is own


def test_the_whole_forward(vllm, monkeypatch):
    """The layer's `forward_cuda`, through vLLM's operator, which is stood in for by what it calls."""
    bench = bench_of(STEPS["mixed"])
    layer, mixed = bench.layer, bench.projections
    expected = bench.run(methods(vllm)[1])[0]
    library = torch.library.Library("vllm", "FRAGMENT")
    name = cuda.OPERATOR
    library.define(f"{name}(Tensor mixed_qkvz, Tensor ba, Tensor(a!) core_attn_out, str layer_name) -> ()")

    def operator(mixed_qkvz, ba, core_attn_out, layer_name):
        assert layer_name == layer.prefix
        getattr(layer, cuda.METHOD)(mixed_qkvz, ba, core_attn_out)

    library.impl(name, operator, "CompositeExplicitAutograd")
    vars(layer).update(
        in_proj_qkvz=lambda x: (mixed[0], None),
        in_proj_ba=lambda x: (mixed[1], None),
        out_proj=lambda x: (x, None),
    )
    context = SimpleNamespace(attn_metadata={layer.prefix: bench.metadata}, no_compile_layers={})
    monkeypatch.setattr(trial, "difference", lambda *given: None)
    override = importlib.import_module("vllm.forward_context").override_forward_context
    hidden = torch.zeros(mixed[0].shape[0], 8, dtype=torch.bfloat16, device=DEVICE)
    try:
        with integration.installed(), override(context), torch.no_grad():
            out = layer.forward_cuda(hidden)
    finally:
        library._destroy()
    assert torch.equal(out, expected.flatten(1))


def test_a_run_to_measure_memory(vllm, monkeypatch):
    """Without metadata, vLLM's own warms its kernels up."""
    bench, reached = bench_of(STEPS["decode"]), []
    monkeypatch.setattr(vllm.QwenGatedDeltaNetAttention, cuda.METHOD, lambda *given: reached.append(given))
    _, ours = methods(vllm)
    bench.metadata = None
    bench.run(ours)
    assert len(reached) == 1


@pytest.mark.gpus(1)
@pytest.mark.parametrize("name", ["decode", "drafts"])
def test_a_graph(vllm, name):
    bench = bench_of(STEPS[name], num_spec=3 if name == "drafts" else 0)
    _, ours = methods(vllm)
    expected = bench.run(ours)
    override = importlib.import_module("vllm.forward_context").override_forward_context
    context = SimpleNamespace(attn_metadata={bench.layer.prefix: bench.metadata}, no_compile_layers={})
    kept = [one.clone() for one in bench.layer.kv_cache]
    out = torch.zeros_like(expected[0])
    graph = torch.cuda.CUDAGraph()
    with override(context), torch.cuda.graph(graph):
        ours(bench.layer, *bench.projections, out)
    for one, before in zip(bench.layer.kv_cache, kept, strict=True):
        one.copy_(before)
    graph.replay()
    assert all(map(torch.equal, (out, *bench.layer.kv_cache), expected))
