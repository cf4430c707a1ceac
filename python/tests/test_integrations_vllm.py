"""vLLM's own files: its plugin loader and the layer's own `forward_cuda` and `forward_cpu`, run on the CPU.

The files come from vLLM's wheel, see peers.py. Everything of vLLM that is not named in REAL is a stand-in;
the projections, the norm and the custom operators of the attention core record what they get.
"""

import importlib
import logging
import shutil
import sys
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import peers
import pytest
import stand_ins

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", reason="vLLM's layer imports it")
pytest.importorskip("einops", reason="vLLM's layer imports it")

import gdn.integrations.vllm as integration
from gdn.integrations import UnknownEngine, known, trial
from gdn.integrations.on_import import OnImport
from gdn.integrations.ops import VARIABLE

FOLDER = peers.folder("vllm")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"vLLM's files are not in {FOLDER}: run python tests/peers.py vllm"
)

MODULE, PLUGINS = integration.MODULE, "vllm.plugins"
GROUP = "vllm.general_plugins"
REAL = {MODULE, PLUGINS, MODULE.rpartition(".")[0] + ".base"}
HEADS = [(4, 8, 32, 32), (16, 32, 128, 128), (2, 6, 16, 24)]
AS_BEFORE = [(2, 2, 16, 16), (1, 4, 16, 16)]  # on the CPU, see `rewrite.goes_to_gdn`


class PluggableLayer(torch.nn.Module):
    @classmethod
    def register(cls, name):
        return lambda layer: layer


class MambaBase:
    pass


def no():
    return False


AITER = SimpleNamespace(are_gdn_triton_kernels_available=no, is_rdna_gdn_triton_kernels_available=no)
GIVEN = {
    "vllm.model_executor.custom_op": {"CustomOp": PluggableLayer, "PluggableLayer": PluggableLayer},
    "vllm.model_executor.layers.mamba.abstract": {"MambaBase": MambaBase},
    "vllm._aiter_ops": {"rocm_aiter_ops": AITER},
    "vllm.utils.torch_utils": {"_encode_layer_name": lambda name: name},
}


@pytest.fixture
def edited(tmp_path):
    """A copy of vLLM's real files in which a test may change some before they are imported."""
    return stand_ins.copied(FOLDER, REAL, tmp_path)


@pytest.fixture
def vllm(monkeypatch, request):
    """vLLM's modules, importable; no plugin chosen."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv(VARIABLE, "split")  # the rest on CUDA: test_integrations_vllm_cuda.py
    folder = request.getfixturevalue("edited") if "edited" in request.fixturenames else FOLDER
    envs = SimpleNamespace(VLLM_PLUGINS=None)
    with stand_ins.engine(folder, "vllm", REAL, GIVEN):
        stand_in = importlib.import_module("vllm")
        sys.modules["vllm.envs"] = stand_in.envs = envs
        yield envs
        integration.uninstall()
        for one in [one for one in sys.meta_path if isinstance(one, OnImport)]:
            one.cancel()


def layer_class():
    return importlib.import_module(MODULE).QwenGatedDeltaNetAttention


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of `gdn.split` was given, those of the trial left out."""
    rows, split, difference = [], integration.gdn.split, trial.difference

    def uncounted(*tried):
        before = len(rows)
        found = difference(*tried)
        del rows[before:]
        return found

    monkeypatch.setattr(trial, "difference", uncounted)

    def counted(mixed_qkvz, *rest, **kwargs):
        rows.append(mixed_qkvz.shape[0])
        return split(mixed_qkvz, *rest, **kwargs)

    monkeypatch.setattr(integration.gdn, "split", counted)
    return rows


GOT = []  # what the custom operators of the attention core got


@pytest.fixture(scope="module")
def core():
    """vLLM's custom operators of the attention core, as operators of PyTorch: they record what they get."""
    library = torch.library.Library("vllm", "FRAGMENT")
    schema = "(Tensor mixed_qkv, Tensor b, Tensor a, Tensor(a!) core_attn_out, {} layer_name) -> ()"

    def record(mixed_qkv, b, a, core_attn_out, layer_name):
        GOT.append((mixed_qkv, b, a))
        v = mixed_qkv[:, mixed_qkv.shape[1] - core_attn_out[0].numel() :]
        core_attn_out.copy_(v.reshape(core_attn_out.shape) * torch.sigmoid(b + a).unsqueeze(-1))

    for name in ("qwen_gdn_attention_core", "cpu_gdn_attention_core"):
        library.define(name + schema.format("str"))
        library.impl(name, record, "CPU")
        library._register_fake(name, lambda *args: None)
    yield
    library._destroy()


def layer_of(heads, interleaved=True, tp_size=1, dtype=torch.bfloat16):
    """A layer of vLLM, for one rank of `tp_size`; `heads` are the whole model's."""
    cls = layer_class()
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    num_k, num_v, dim_k, dim_v = heads
    layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim = heads
    layer.key_dim, layer.value_dim = num_k * dim_k, num_v * dim_v
    layer.tp_size, layer.tp_rank, layer.prefix = tp_size, 0, "layers.0"
    layer.gqa_interleaved_layout, layer.disable_tp_for_ba_proj = interleaved, False
    layer.enable_fused_gdn_spec_decode = False
    made = torch.Generator().manual_seed(0)
    qkvz = torch.randn(64, (2 * num_k * dim_k + 2 * num_v * dim_v) // tp_size, generator=made).to(dtype)
    ba = torch.randn(64, 2 * num_v // tp_size, generator=made).to(dtype)
    layer.in_proj_qkvz = lambda hidden: (qkvz[: hidden.shape[0]] + hidden[:, :1], None)
    layer.in_proj_ba = lambda hidden: (ba[: hidden.shape[0]] + hidden[:, :1], None)
    layer._output_projection = lambda core_attn_out, z: core_attn_out * z
    return layer


def hidden(n, dtype=torch.bfloat16):
    return torch.linspace(-1, 1, n * 4).reshape(n, 4).to(dtype)


@pytest.mark.parametrize("method", integration.METHODS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("n", [1, 5])
def test_the_layer_s_own_forward(vllm, core, calls, method, heads, n):
    layer = layer_of(heads)
    GOT.clear()
    before = getattr(layer, method)(hidden(n))
    assert calls == []
    with integration.installed():
        after = getattr(layer, method)(hidden(n))
    assert calls == [n]
    assert torch.equal(before, after) and before.shape == (n, heads[1], heads[3])
    for one, other in zip(*GOT, strict=True):
        assert torch.equal(one, other) and one.shape == other.shape and other.is_contiguous()
    getattr(layer, method)(hidden(n))
    assert calls == [n]  # vLLM's own again


@pytest.mark.parametrize("heads", AS_BEFORE)
def test_heads_that_are_split_as_before(vllm, core, calls, heads):
    layer = layer_of(heads)
    GOT.clear()
    before = layer.forward_cpu(hidden(5))
    with integration.installed():
        assert torch.equal(before, layer.forward_cpu(hidden(5)))
    assert calls == []
    for one, other in zip(*GOT, strict=True):
        assert torch.equal(one, other) and one.stride() == other.stride()


@pytest.mark.parametrize("tp_size", [2, 4])
def test_a_rank_of_tensor_parallelism(vllm, core, calls, tp_size):
    layer = layer_of((16, 32, 128, 128), tp_size=tp_size)
    GOT.clear()
    before = layer.forward_cuda(hidden(3))
    with integration.installed():
        assert torch.equal(before, layer.forward_cuda(hidden(3)))
    assert calls == [3] and all(map(torch.equal, *GOT))


@pytest.mark.parametrize("method", integration.METHODS)
def test_contiguous_packing_stays_a_view(vllm, core, calls, method):
    layer = layer_of((16, 48, 128, 128), interleaved=False)
    before = getattr(layer, method)(hidden(3))
    with integration.installed():
        assert torch.equal(before, getattr(layer, method)(hidden(3)))
    assert calls == []


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_with_any_number_of_tokens(vllm, core, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler for the CPU")
    f32 = torch.float32  # where Inductor rounds as eager does
    layer = layer_of((4, 8, 32, 32), dtype=f32)
    eager = {n: layer.forward_cuda(hidden(n, f32)) for n in (2, 5, 33)}
    inner = torch._dynamo.lookup_backend(backend)

    def compiled_into():
        """What the graphs call, a list for each compilation."""
        graphs = []

        def counted(graph, inputs):
            graphs.append([getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes])
            return inner(graph, inputs)

        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: layer.forward_cuda(x), backend=counted, fullgraph=True, dynamic=True
        )
        for n, expected in eager.items():
            assert torch.equal(compiled(hidden(n, f32)), expected)
        return graphs

    (before,) = compiled_into()
    assert "cat" in before and not any("gdn.split" in name for name in before)
    with integration.installed():
        (after,) = compiled_into()
    assert "cat" not in after and sum("split" in name for name in after) == 1, after


# vLLM's plugin loader


@pytest.fixture
def loader(vllm, monkeypatch):
    """vLLM's plugin loader, which finds gdn's entry point, and `choose`, which sets VLLM_PLUGINS."""
    mine = EntryPoint("gdn", "gdn.integrations.vllm:plugin", GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [mine] if group == GROUP else [])
    loader = importlib.import_module(PLUGINS)

    def choose(chosen):
        if chosen is not None:
            monkeypatch.setenv("VLLM_PLUGINS", chosen)
            vllm.VLLM_PLUGINS = chosen.split(",")
        loader.load_general_plugins()

    return choose


@pytest.mark.parametrize("chosen", [None, "", "other"])
def test_vllm_loads_the_plugin_and_nothing_happens(loader, chosen):
    loader(chosen)
    layer_class()
    assert not integration.is_installed()


@pytest.mark.parametrize("imported", ["before", "after"])
@pytest.mark.parametrize("chosen", ["gdn", "other,gdn"])
def test_vllm_loads_the_plugin_when_chosen(loader, core, calls, caplog, chosen, imported):
    with caplog.at_level(logging.INFO):
        if imported == "before":
            layer_class()
        loader(chosen)
        assert (MODULE in sys.modules) == (imported == "before")  # the plugin imports nothing of vLLM's
        integration.plugin()  # vLLM may run it more than once in a process
        layer = layer_of((4, 8, 32, 32))
    assert integration.is_installed()
    layer.forward_cuda(hidden(3))
    assert calls == [3]
    (line,) = [r.getMessage() for r in caplog.records if r.name == "vllm.gdn.integrations.vllm"]
    assert "forward_cuda" in line and "gdn is on" in line


def test_a_refusal_leaves_the_engine_as_it_is(edited, loader, caplog):
    edit(edited, "forward_cuda", "(query, key, value), dim=-1", "(key, query, value), dim=-1")
    loader("gdn")
    forward = layer_class().forward_cuda  # imports, whatever gdn says
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "gdn stays off" in line and "forward_cuda" in line and "Nothing was changed" in line
    assert not integration.is_installed() and forward is layer_class().forward_cuda


def test_the_plugin_warns_of_nothing_and_install_of_what_it_does_not_reach(loader, caplog, monkeypatch):
    loader("gdn")
    layer_class()
    assert integration.is_installed()
    integration.install()  # VLLM_PLUGINS reaches every process
    assert not [r for r in caplog.records if "VLLM_PLUGINS=gdn" in r.getMessage()]
    integration.uninstall()
    monkeypatch.delenv("VLLM_PLUGINS")
    integration.install()
    (line,) = [r.getMessage() for r in caplog.records if "VLLM_PLUGINS=gdn" in r.getMessage()]
    assert "spawns" in line


def test_gdn_declares_the_entry_point():
    found = [one.load() for one in entry_points(group=GROUP) if one.name == integration.PLUGIN]
    assert found == [integration.plugin]


def test_vllm_keeps_compiled_graphs_of_other_plugins_apart():
    """VLLM_PLUGINS is not among what vLLM leaves out of its key for compiled graphs."""
    text = (FOLDER / "vllm/envs.py").read_text()
    assert '"VLLM_PLUGINS": lambda' in text
    start = text.index("ignored_factors: set[str] = {")
    assert "VLLM_PLUGINS" not in text[start : text.index("}\n", start)]


# What is refused


def refused(match, **how):
    layer = layer_class()
    before = dict(vars(layer))
    with pytest.raises(RuntimeError, match=match) as refusal:
        integration.install(**how)
    assert isinstance(refusal.value, UnknownEngine) and "Nothing was changed" in str(refusal.value)
    assert dict(vars(layer)) == before and not integration.is_installed()


def edit(folder, name, old, new):
    """Changes one place of the layer's method `name` in vLLM's copied file."""
    file = folder / ("/".join(MODULE.split(".")) + ".py")
    text = file.read_text()
    start = text.index("class QwenGatedDeltaNetAttention")
    at = text.index(old, text.index(f"    def {name}(", start))
    file.write_text(text[:at] + new + text[at + len(old) :])


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0.dev3", None])
@pytest.mark.parametrize("distribution", integration.DISTRIBUTIONS)
def test_any_release_and_distribution_that_passes_the_trial(vllm, monkeypatch, distribution, version):
    def recorded(name):
        if name != distribution or version is None:
            raise known.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(known.importlib.metadata, "version", recorded)
    expected = f"{distribution} {version}" if version else "vllm of no recorded version"
    assert known.release(*integration.DISTRIBUTIONS) == expected
    with integration.installed():
        assert integration.is_installed()


SPLIT = "fix_query_key_value_ordering"


@pytest.mark.parametrize(
    "name, old, new",
    [
        (
            SPLIT,
            "return query, key, value, z, b, a",
            "z = z.clone()\n        return query, key, value, z, b, a",
        ),
        ("forward_cuda", "num_tokens = hidden_states.size(0)", "num_tokens = len(hidden_states)"),
        ("forward_cpu", "mixed_qkvz, ba\n", "mixed_qkvz, ba.contiguous()\n"),
        (
            "forward_cpu",
            "core_attn_out = torch.zeros(",
            "core_attn_out = torch.empty_like(z)\n        torch.zeros(",
        ),
    ],
)
def test_another_source_that_does_the_same_is_taken(edited, vllm, core, name, old, new):
    edit(edited, name, old, new)
    layer = layer_of((4, 8, 32, 32))
    before = layer.forward_cpu(hidden(5)), layer.forward_cuda(hidden(5))
    with integration.installed():
        assert all(map(torch.equal, before, (layer.forward_cpu(hidden(5)), layer.forward_cuda(hidden(5)))))


@pytest.mark.parametrize(
    "name, old, new, match",
    [
        (SPLIT, "return query, key, value, z, b, a", "return query, key, value, z, a, b", "something else"),
        (
            SPLIT,
            "return query, key, value, z, b, a",
            "return query, key, value, z * 2, b, a",
            "something else",
        ),
        (
            SPLIT,
            "return query, key, value, z, b, a",
            "return query, key, value, z, b.float(), a",
            "something else",
        ),
        (SPLIT, "return query, key, value, z, b, a", "return query, key, value, z, b", "not enough values"),
        (SPLIT, "b = b.reshape(", "b = self.reordered(", "tiny layer of the trial has no reordered"),
        (SPLIT, "mixed_ba: torch.Tensor,", "mixed_ba: torch.Tensor, order=0,", "takes .*mixed_ba, order"),
        (
            "forward_cuda",
            "hidden_states: torch.Tensor,",
            "hidden_states, residual=None,",
            "hidden_states, residual",
        ),
        ("forward_cuda", "cat((query, key, value)", "cat((key, query, value)", "flatten and concatenate"),
        ("forward_cpu", "cat((query, key, value)", "cat((query, value, key)", "flatten and concatenate"),
    ],
)
def test_a_source_that_does_something_else_is_refused(edited, vllm, name, old, new, match):
    edit(edited, name, old, new)
    for any_release in (False, True):
        refused(match, any_release=any_release)


def test_a_method_that_another_plugin_has_wrapped_is_refused(vllm, monkeypatch):
    layer = layer_class()
    own = layer.forward_cpu

    def wrapper(self, hidden_states):
        return own(self, hidden_states)

    wrapper.__wrapped__ = own
    monkeypatch.setattr(layer, "forward_cpu", wrapper)
    refused("has wrapped vllm's QwenGatedDeltaNetAttention.forward_cpu")


def test_install_while_a_model_is_loaded(vllm):
    """The layer is imported then, with other defaults for new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), integration.installed():
            assert integration.is_installed()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("change", ["order", "dtype", "shape", "bits", "call"])
def test_the_trial_sees_every_difference(vllm, monkeypatch, change):
    """What gdn hands on is wrong in one way."""
    split = integration.gdn.split

    def wrong(*args, **kwargs):
        mixed_qkv, z, b, a = split(*args, **kwargs)
        if change == "call":
            raise ValueError("no")
        return {
            "order": (mixed_qkv, z, a, b),
            "dtype": (mixed_qkv, z, b.float(), a),
            "shape": (mixed_qkv, z.flatten(1), b, a),
            "bits": (mixed_qkv.index_fill(1, torch.tensor([5]), 0), z, b, a),
        }[change]

    monkeypatch.setattr(integration.gdn, "split", wrong)
    refused("ended with ValueError: no" if change == "call" else "something else")


def test_a_build_for_another_accelerator_is_refused(vllm, monkeypatch):
    monkeypatch.setattr(torch.version, "xpu", "20250301")
    refused("XPU")


def test_a_method_that_is_gone_is_refused(edited, vllm):
    file = edited / ("/".join(MODULE.split(".")) + ".py")
    file.write_text(file.read_text().replace("fix_query_key_value_ordering", "unpack"))
    refused("has no QwenGatedDeltaNetAttention.fix_query_key_value_ordering")
