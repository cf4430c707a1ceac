"""transformers' own Qwen3-Next in training, randomly initialised: the same bits with gdn's split and without. And what is refused."""

import importlib.util
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

if not transformers.__version__.startswith("5.23."):
    pytest.skip(f"transformers 5.23 is needed, here is {transformers.__version__}", allow_module_level=True)

import test_integrations_transformers_core
import tiny_models
from transformers.models.qwen3_next import modeling_qwen3_next as modeling

import gdn.integrations.transformers as integration
from gdn.integrations import UnknownEngine, known, rewrite

Layer = modeling.Qwen3NextGatedDeltaNet
HEADS = [(4, 8, 32, 32), (2, 6, 16, 24), (3, 12, 24, 8)]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
AS_BEFORE = [(2, 2, 16, 16), (1, 4, 16, 16)]  # on the CPU, see `rewrite.goes_to_gdn`
off_again = test_integrations_transformers_core.off_again


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of `gdn.split` was given."""
    rows, split = [], integration.gdn.split

    def counted(mixed_qkvz, *rest, **kwargs):
        rows.append(mixed_qkvz.shape[0])
        return split(mixed_qkvz, *rest, **kwargs)

    monkeypatch.setattr(integration.gdn, "split", counted)
    return rows


def model(heads=HEADS[0], dtype=torch.float32):
    torch.manual_seed(0)
    config = tiny_models.config("Qwen3Next", heads, num_experts=4)
    return transformers.Qwen3NextForCausalLM(config).to(dtype).eval()


def tokens(batch, length):
    return torch.randint(
        0, tiny_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1)
    )


def same(before, after):
    assert len(before) == len(after) > 0
    for one, other in zip(before, after, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
        assert torch.equal(one.view(bits), other.view(bits))


def both(run, calls):
    """What `run` returns without gdn and with it. gdn has to be used the second time, and only then."""
    before = run()
    assert calls == []
    with integration.installed():
        after = run()
    assert calls
    used = len(calls)
    again = run()
    assert len(calls) == used
    same(before, again)
    return before, after


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_of_prefill(heads, dtype, device, calls):
    net, ids = model(heads, dtype).to(device), tokens(3, 70).to(device)
    same(*both(lambda: [net(ids).logits.detach()], calls))
    assert calls == [3 * 70] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", AS_BEFORE)
def test_heads_that_are_split_as_before(heads, dtype, calls):
    net, ids = model(heads, dtype), tokens(3, 70)
    before = net(ids).logits.detach()
    with integration.installed():
        same([before], [net(ids).logits.detach()])
    assert calls == []


@pytest.mark.parametrize("heads", HEADS)
def test_gradients(heads, calls):
    net, ids = model(heads).train(), tokens(2, 70)

    def run():
        net.zero_grad()
        loss = net(ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    same(*both(run, calls))


def test_gradient_checkpointing(calls):
    net, ids = model().train(), tokens(2, 20)
    net.gradient_checkpointing_enable()

    def run():
        net.zero_grad()
        net(ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    same(*both(run, calls))
    assert len(calls) == 6  # each layer's forward ran twice


def test_one_layer_gets_what_it_got_before():
    """`mixed_qkv`, `z`, `b` and `a`, with their shapes, types and strides, where heads are more than one."""
    layer = model(HEADS[1]).model.layers[0].linear_attn
    qkvz = torch.randn(2, 5, layer.in_proj_qkvz.out_features).bfloat16()
    ba = torch.randn(2, 5, layer.in_proj_ba.out_features)
    before = rewrite.as_before(layer, integration.SPLIT, qkvz, ba)
    with integration.installed():
        after = layer.split_with_gdn(qkvz, ba)
    same(before, after)
    assert [one.stride() for one in before] == [one.stride() for one in after]


def test_tensors_that_gdn_does_not_take_are_split_as_before(calls):
    net = model(dtype=torch.bfloat16).to("meta")  # torch 2.11 has the experts' product on meta in bf16 alone
    with integration.installed():
        assert net(tokens(2, 5).to("meta")).logits.shape == (2, 5, tiny_models.VOCABULARY)
    assert calls == []


def test_compiled_layer(calls):
    """In one graph, for any length, and a whole layer with the bits that it has, compiled too, without gdn."""
    layer = model().model.layers[0].linear_attn
    given = [torch.randn(2, n, 64) for n in (3, 17, 70)]

    def compiled_layer(one):
        torch._dynamo.reset()
        return torch.compile(layer, backend="eager")(one).detach()

    eager = [layer(one).detach() for one in given]
    before = [compiled_layer(one) for one in given]
    with integration.installed():
        torch._dynamo.reset()
        compiled = torch.compile(layer.split_with_gdn, backend="aot_eager", fullgraph=True, dynamic=True)
        for one in given:
            projections = [projection(one).detach() for projection in (layer.in_proj_qkvz, layer.in_proj_ba)]
            same(list(layer.split_with_gdn(*projections)), list(compiled(*projections)))
        same(before, [compiled_layer(one) for one in given])
        same([layer(one).detach() for one in given], eager)


def test_install_is_idempotent_and_undoable():
    forward = Layer.__dict__["forward"]
    integration.install()
    installed = Layer.__dict__["forward"]
    integration.install()
    assert integration.is_installed() and Layer.__dict__["forward"] is installed is not forward
    with integration.installed():  # was on before, stays on after
        pass
    assert integration.is_installed()
    integration.uninstall()
    integration.uninstall()
    assert not integration.is_installed()
    assert Layer.__dict__["forward"] is forward and not hasattr(Layer, integration.FUSED)


def test_tracebacks_show_the_engine_s_own_lines(monkeypatch):
    def fails(*args, **kwargs):
        raise ZeroDivisionError

    net = model()
    with integration.installed(), pytest.raises(ZeroDivisionError) as failed:
        monkeypatch.setattr(modeling, "causal_conv1d_fn", fails)
        net(tokens(1, 3))
    entry = failed.traceback[-2]
    assert str(entry.path) == modeling.__file__
    with open(modeling.__file__) as lines:
        assert "causal_conv1d_fn(" in list(lines)[entry.lineno]


def refused(match, layer=Layer, **how):
    before = dict(vars(layer))
    with pytest.raises(RuntimeError, match=match) as refusal:
        integration.install(**how)
    assert isinstance(refusal.value, UnknownEngine) and "Nothing was changed" in str(refusal.value)
    assert dict(vars(layer)) == before and not integration.is_installed()


@pytest.mark.parametrize("version", ["5.24.0", "5.2.3", "5.230.0", "5.23.0.dev0", "5.23.0rc1", "4.57.1"])
def test_another_release_is_refused(monkeypatch, version):
    monkeypatch.setattr(known.importlib.metadata, "version", lambda name: version)
    refused(rf"transformers {version}; it knows 5\.23")


def test_an_engine_that_is_not_there():
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_engine'"):
        known.check_release("no_such_engine", ("1.0",), any_release=False)


def test_another_release_with_known_source_on_request(monkeypatch, calls):
    monkeypatch.setattr(known.importlib.metadata, "version", lambda name: "5.24.0")
    net = model()
    with integration.installed(any_release=True):
        net(tokens(1, 3))
    assert calls == [3] * 3


@pytest.mark.parametrize("version", ["5.23", "5.23.1", "5.23.0.post1", "5.23.0+local"])
def test_the_same_release(monkeypatch, version):
    monkeypatch.setattr(known.importlib.metadata, "version", lambda name: version)
    with integration.installed():
        assert integration.is_installed()


@pytest.mark.parametrize(
    "name, old, new",
    [
        (
            "fix_query_key_value_ordering",
            "return query, key, value, z, b, a",
            "return query, key, value, z, a, b",
        ),
        ("forward", "torch.cat((query, key, value), dim=-1)", "torch.cat((key, query, value), dim=-1)"),
    ],
)
def test_changed_source_is_refused(monkeypatch, tmp_path, name, old, new):
    with open(modeling.__file__) as file:
        text = file.read()
    start = text.index(f"    def {name}(", text.index("class Qwen3NextGatedDeltaNet"))
    at = text.index(old, start)
    (tmp_path / "changed.py").write_text(text[:at] + new + text[at + len(old) :])

    path = modeling.__name__ + "_changed"
    spec = importlib.util.spec_from_file_location(path, tmp_path / "changed.py")
    changed = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path, changed)
    spec.loader.exec_module(changed)
    monkeypatch.setattr(integration, "MODULE", path)
    for any_release in (False, True):
        refused(
            f"{name} of transformers: the source is", changed.Qwen3NextGatedDeltaNet, any_release=any_release
        )


@pytest.mark.parametrize("name", ["fix_query_key_value_ordering", "forward"])
def test_a_method_that_somebody_replaced_is_refused(monkeypatch, name):
    def replaced(self, *args):
        return None

    monkeypatch.setattr(Layer, name, replaced)
    refused(f"{name} of transformers: the source is", any_release=True)


def test_a_method_that_somebody_wrapped_is_refused(monkeypatch):
    import functools

    @functools.wraps(Layer.forward)
    def wrapped(*args, **kwargs):
        return None

    monkeypatch.setattr(Layer, "forward", wrapped)
    refused("has wrapped")


def test_a_build_for_another_accelerator_is_refused(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    refused("HIP")
