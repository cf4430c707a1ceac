"""SGLang's own files: plugin loader, HookRegistry, Triton kernels (interpreted), layers that call them.

The files come from SGLang's wheel, see peers.py. Everything of SGLang that is not named in REAL is a
stand-in.
"""

import importlib
import logging
import sys
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import peers
import pytest
import stand_ins

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="SGLang's kernels are Triton's")

import gdn.integrations.sglang as integration
from gdn.integrations import UnknownEngine, known
from gdn.integrations.ops import VARIABLE

FOLDER = peers.folder("sglang")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"SGLang's files are not in {FOLDER}: run python tests/peers.py sglang"
)

OPS = integration.MODULE
PLUGINS, REGISTRY = "sglang.srt.plugins", integration.REGISTRY
INTERLEAVED, CONTIGUOUS = "sglang.srt.models.qwen3_next", "sglang.srt.models.qwen3_5"
BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
REAL = {OPS, PLUGINS, REGISTRY, "sglang.srt.environ", INTERLEAVED, CONTIGUOUS, BACKEND}
NAMES = {
    "fused_qkvzba_split_reshape_cat": "interleaved",
    "fused_qkvzba_split_reshape_cat_contiguous": "contiguous",
}
SITES = {INTERLEAVED: list(NAMES)[0], CONTIGUOUS: list(NAMES)[1], BACKEND: list(NAMES)[1]}


class Struct:
    def __init_subclass__(cls, **kwargs):
        pass


def yes():
    return True


def no():
    return False


PLATFORM = dict(
    is_cuda=yes, is_cpu=no, is_hip=no, is_npu=no, is_xpu=no, is_gfx95_supported=no, cpu_has_amx_support=no
)
GIVEN = {"sglang.srt.utils": PLATFORM, "sglang.srt.utils.common": PLATFORM}


@pytest.fixture
def edited(tmp_path):
    """A copy of SGLang's real files in which a test may change some before they are imported."""
    return stand_ins.copied(FOLDER, REAL, tmp_path)


@pytest.fixture
def sglang(monkeypatch, request):
    """SGLang's modules, importable; on the CPU Triton's interpreter for its compiler; no plugin chosen."""
    if (
        getattr(request.node, "callspec", None) is None
        or request.node.callspec.params.get("device") != "cuda"
    ):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setenv(VARIABLE, "split")  # the rest: test_integrations_sglang_layer.py
    folder = request.getfixturevalue("edited") if "edited" in request.fixturenames else FOLDER
    given = dict(GIVEN)
    if "msgspec" not in sys.modules and importlib.util.find_spec("msgspec") is None:
        given["msgspec"] = {"Struct": Struct}
    with stand_ins.engine(folder, "sglang", REAL, given):
        yield
        integration.uninstall()


def load(name):
    return importlib.import_module(name)


def packed(heads, n, dtype=torch.float32, ba_dtype=None):
    num_k, num_v, dim_k, dim_v = heads
    made = torch.Generator().manual_seed(n)
    qkvz = torch.randn(n, 2 * num_k * dim_k + 2 * num_v * dim_v, generator=made).to(dtype)
    return qkvz, torch.randn(n, 2 * num_v, generator=made).to(ba_dtype or dtype)


def same(before, after):
    assert len(before) == len(after) == 4
    for one, other in zip(before, after, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert torch.equal(one, other)


@pytest.fixture
def calls(monkeypatch):
    """The names of gdn's functions, as they are called."""
    made = []
    for name, function in integration.BY.items():

        def counted(*args, _name=name, _function=function, **kwargs):
            made.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setitem(integration.BY, name, counted)
    return made


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", [(2, 2, 16, 16), (4, 8, 32, 32), (2, 8, 16, 32), (16, 32, 128, 128)])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)]
)
def test_what_sglang_s_own_kernels_put_out(sglang, calls, name, heads, dtypes, device):
    ops = load(OPS)
    for n in (1, 3):
        given = *(tensor.to(device) for tensor in packed(heads, n, *dtypes)), *heads
        before = getattr(ops, name)(*given)
        assert calls == []
        with integration.installed():
            same(before, getattr(ops, name)(*given))
        assert calls == [name]
        calls.clear()


@pytest.mark.parametrize("imported", ["before", "after"])
def test_every_place_that_imported_the_functions(sglang, imported):
    ops = load(OPS)
    originals = {name: getattr(ops, name) for name in NAMES}
    if imported == "before":
        for site, name in SITES.items():
            assert getattr(load(site), name) is originals[name]
    integration.install()
    for name in NAMES:
        assert getattr(ops, name) is not originals[name]
        assert getattr(ops, name).__wrapped__ is originals[name]  # the registry's own wrapper
    for site, name in SITES.items():
        assert getattr(load(site), name) is getattr(ops, name)
    integration.uninstall()
    for name in NAMES:
        assert getattr(ops, name) is originals[name]
    for site, name in SITES.items():
        assert getattr(load(site), name) is originals[name]
    registry = load(REGISTRY).HookRegistry
    assert not registry._hooks and not registry._patched


def layer_of(cls, heads, qkvz, ba):
    """A layer of SGLang with its own `forward`, on given projections. What attention gets is recorded."""
    layer = cls.__new__(cls)
    torch.nn.Module.__init__(layer)
    layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim = heads
    layer.attn_tp_size, layer.got = 1, []
    layer._forward_input_proj = lambda hidden: (qkvz, ba)

    def attn(forward_batch, *, mixed_qkv, a, b):
        layer.got.append((mixed_qkv, b, a))
        return mixed_qkv[:, -heads[1] * heads[3] :].reshape(-1, heads[1], heads[3])

    def norm(core, z):
        layer.got[-1] += (z.reshape(-1, *heads[1:4:2]),)
        return core * torch.sigmoid(z.float()).to(core.dtype)

    layer.attn, layer.norm = attn, norm
    layer.out_proj = lambda core: (core, None)
    return layer


@pytest.mark.parametrize(
    "site, cls", [(INTERLEAVED, "Qwen3GatedDeltaNet"), (CONTIGUOUS, "Qwen3_5GatedDeltaNet")]
)
def test_the_layers_own_forward(sglang, calls, monkeypatch, site, cls):
    heads = (4, 8, 32, 32)
    qkvz, ba = packed(heads, 5, torch.bfloat16)
    module = load(site)
    layer = layer_of(getattr(module, cls), heads, qkvz, ba)
    if site == CONTIGUOUS:
        for name, value in dict(_is_xpu=False, _gdn_decode_fused_proj_conv=False).items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module, "_fp8_tuple_input", lambda *_: False)
    mode = SimpleNamespace(is_target_verify=no, is_decode=yes, is_extend_without_speculative=no, is_extend=no)
    batch = SimpleNamespace(forward_mode=mode, logical_forward_mode=mode)
    before = layer.forward(torch.zeros(5, 8), batch)
    assert calls == []
    with integration.installed():
        after = layer.forward(torch.zeros(5, 8), batch)
    assert calls == [SITES[site]]
    assert torch.equal(before, after)
    same(*layer.got)


def test_compiled_in_one_graph_with_any_number_of_tokens(sglang):
    """As SGLang's compiled prefill does it, through the registry's wrapper and a name imported before."""
    site = load(INTERLEAVED)
    heads, graphs = (4, 8, 32, 32), []
    before = {n: load(OPS).fused_qkvzba_split_reshape_cat(*packed(heads, n), *heads) for n in (2, 5, 33)}

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with integration.installed():

        @torch.compile(backend=counted, fullgraph=True, dynamic=True)
        def split(qkvz, ba):
            return site.fused_qkvzba_split_reshape_cat(qkvz, ba, *heads)

        for n, expected in before.items():
            same(expected, split(*packed(heads, n)))
    assert len(graphs) == 1


# SGLang's plugin loader


@pytest.fixture
def loader(sglang, monkeypatch):
    """SGLang's plugin loader, which finds gdn's entry point and, where a test gives one, another's."""
    plugins, others = load(PLUGINS), {}
    mine = EntryPoint("gdn", "gdn.integrations.sglang:plugin", PLUGINS)

    def found(group):
        assert group in (PLUGINS, "sglang.srt.platforms")
        rest = [
            SimpleNamespace(name=name, value="", dist=None, load=lambda f=f: f) for name, f in others.items()
        ]
        return [mine, *rest] if group == PLUGINS else []

    monkeypatch.setattr(plugins, "entry_points", found)
    plugins.others = others
    return plugins


@pytest.mark.parametrize("chosen", [None, "", "other"])
def test_sglang_loads_the_plugin_and_nothing_happens(loader, monkeypatch, chosen):
    if chosen is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", chosen)
    loader.load_plugins()
    assert not integration.is_installed() and not load(REGISTRY).HookRegistry._hooks


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])  # SGLang sets up its log after the plugins
@pytest.mark.parametrize("chosen", ["gdn", "other, gdn"])
def test_sglang_loads_the_plugin_when_chosen(loader, monkeypatch, caplog, calls, chosen, level):
    monkeypatch.setenv("SGLANG_PLUGINS", chosen)
    with caplog.at_level(level):
        loader.load_plugins()
    assert integration.is_installed()
    given = *packed((2, 4, 16, 16), 3), 2, 4, 16, 16
    load(INTERLEAVED).fused_qkvzba_split_reshape_cat(*given)
    load(BACKEND).fused_qkvzba_split_reshape_cat_contiguous(*given)
    assert calls == list(NAMES)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "sglang.gdn.integrations.sglang"]
    assert all(name in line for name in NAMES)


@pytest.mark.parametrize("first", [True, False])
def test_beside_another_plugin_s_hook_on_the_same_function(loader, monkeypatch, calls, first):
    seen = []

    def other():
        registry = load(REGISTRY)

        def around(original, *args, **kwargs):
            seen.append(len(args))
            return original(*args, **kwargs)

        target = f"{OPS}.fused_qkvzba_split_reshape_cat"
        registry.HookRegistry.register(target, around, registry.HookType.AROUND)

    loader.others["other"] = other
    monkeypatch.setenv("SGLANG_PLUGINS", "gdn,other")
    if first:
        original = loader.entry_points
        monkeypatch.setattr(loader, "entry_points", lambda group: original(group)[::-1])
    loader.load_plugins()
    given = *packed((2, 4, 16, 16), 3), 2, 4, 16, 16
    expected = load(INTERLEAVED).fused_qkvzba_split_reshape_cat(*given)
    assert seen == [6] and calls == ["fused_qkvzba_split_reshape_cat"]
    integration.uninstall()  # gdn's goes, the other's stays
    same(expected, load(INTERLEAVED).fused_qkvzba_split_reshape_cat(*given))
    assert seen == [6, 6] and calls == ["fused_qkvzba_split_reshape_cat"]


def test_a_refusal_leaves_the_engine_as_it_is(loader, monkeypatch, caplog):
    monkeypatch.setenv("SGLANG_PLUGINS", "gdn")
    monkeypatch.setattr(known.importlib.metadata, "version", lambda name: "0.6.0")
    loader.load_plugins()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "sglang 0.6.0" in line and "0.5.23" in line and "Nothing was changed" in line
    assert not integration.is_installed() and not load(REGISTRY).HookRegistry._hooks


def test_the_plugin_warns_of_nothing_and_install_of_what_it_does_not_reach(loader, caplog, monkeypatch):
    monkeypatch.setenv("SGLANG_PLUGINS", "other, gdn")
    loader.load_plugins()
    integration.install()
    assert not [r for r in caplog.records if "SGLANG_PLUGINS=gdn" in r.getMessage()]
    integration.uninstall()
    monkeypatch.setenv("SGLANG_PLUGINS", "other")
    integration.install()
    (line,) = [r.getMessage() for r in caplog.records if "SGLANG_PLUGINS=gdn" in r.getMessage()]
    assert "spawns" in line


def test_gdn_declares_the_entry_point():
    found = [one.load() for one in entry_points(group=PLUGINS) if one.name == integration.PLUGIN]
    assert found == [integration.plugin]


# What is refused


def refused(match, **how):
    ops = load(OPS)
    before = {name: getattr(ops, name) for name in NAMES}
    with pytest.raises(RuntimeError, match=match) as refusal:
        integration.install(**how)
    assert isinstance(refusal.value, UnknownEngine) and "Nothing was changed" in str(refusal.value)
    assert {name: getattr(ops, name) for name in NAMES} == before
    assert not integration.is_installed()


def test_another_release_is_refused(sglang, monkeypatch):
    monkeypatch.setattr(known.importlib.metadata, "version", lambda name: "0.5.24")
    refused("sglang 0.5.24; it knows 0.5.23")
    with integration.installed(any_release=True):  # its source is the known one
        assert integration.is_installed()


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("fused_qkvzba_split_reshape_cat", "a = torch.empty_like(b)", "a = torch.empty_like(b) "),
        (
            "fused_qkvzba_split_reshape_cat_kernel",
            "k_end: tl.constexpr = q_end",
            "k_end: tl.constexpr = 0 + q_end",
        ),
        (
            "fused_qkvzba_split_reshape_cat_contiguous",
            "[batch * seq_len, num_heads_v],",
            "[batch, num_heads_v],",
        ),
        (
            "fused_qkvzba_split_reshape_cat_contiguous_kernel",
            "\n    NUM_HEADS_V: tl",
            "\n    NUM_HEADS_W: tl",
        ),
    ],
)
def test_changed_source_is_refused(edited, sglang, name, old, new):
    file = edited / ("/".join(OPS.split(".")) + ".py")
    text = file.read_text()
    start = text.index(f"\ndef {name}(")
    at = text.index(old, start)
    file.write_text(text[:at] + new + text[at + len(old) :])
    for any_release in (False, True):
        refused(f"{name} of sglang: the source is", any_release=any_release)


def test_a_function_that_is_gone_is_refused(edited, sglang):
    file = edited / ("/".join(OPS.split(".")) + ".py")
    file.write_text(file.read_text().replace("reshape_cat_contiguous", "reshape_cat_flat"))
    for site in (CONTIGUOUS, BACKEND):
        sys.modules[site] = None
    with pytest.raises(UnknownEngine, match="has no .*fused_qkvzba_split_reshape_cat_contiguous"):
        integration.install()


def test_a_build_for_another_accelerator_is_refused(sglang, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    refused("HIP")


def test_another_plugin_s_replacement_is_refused(sglang):
    registry = load(REGISTRY)
    target = f"{OPS}.fused_qkvzba_split_reshape_cat"
    registry.HookRegistry.register(target, lambda *args: None, registry.HookType.REPLACE)
    refused("another plugin has hooks")
    registry.HookRegistry.apply_hooks()
    refused("another plugin has hooks")
    registry.HookRegistry.reset()
    refused("another plugin has hooks")  # the registry forgot, the function did not
