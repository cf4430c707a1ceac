"""vllm-ascend's own files: its Triton kernel (interpreted) and the layer that calls it, on the CPU.

The files come from vllm-ascend's wheel, see peers.py. Everything of vllm-ascend and vLLM that is not named in
REAL is a stand-in.
"""

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace

import peers
import pytest
import stand_ins

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="vllm-ascend's kernel is Triton's")
pytest.importorskip("einops", reason="vllm-ascend's layer imports it")

import gdn
import gdn.integrations.vllm_ascend as integration
from gdn.integrations import UnknownEngine
from gdn.integrations.on_import import OnImport

FOLDER = peers.folder("vllm_ascend")
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"vllm-ascend's files are not in {FOLDER}: run python tests/peers.py vllm_ascend",
)

MODULE, LAYER, NAME = integration.MODULE, integration.LAYER, integration.NAME
REAL = {MODULE, LAYER}
HEADS = [(4, 8, 32, 32), (2, 2, 16, 16), (2, 8, 16, 32)]
OF_VLLM = [
    "vllm",
    "vllm.distributed",
    "vllm.forward_context",
    "vllm.model_executor",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.fla",
    "vllm.model_executor.layers.fla.ops",
    "vllm.model_executor.layers.fla.ops.l2norm",
    "vllm.model_executor.layers.mamba",
    "vllm.model_executor.layers.mamba.gdn",
    "vllm.model_executor.layers.mamba.gdn.base",
    "vllm.model_executor.layers.mamba.mamba_utils",
    "vllm.triton_utils",
    "vllm.v1",
    "vllm.v1.attention",
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends",
    "vllm.v1.attention.backends.gdn_attn",
    "vllm.v1.attention.backends.utils",
]
GIVEN = {name: {} for name in OF_VLLM} | {
    "vllm.triton_utils": {"triton": triton, "tl": triton.language},
    "vllm.model_executor.layers.mamba.gdn.base": {"GatedDeltaNetAttention": object},
    "vllm_ascend.ops.triton.triton_utils": {"get_vectorcore_num": lambda: 4},
}


@pytest.fixture
def edited(tmp_path):
    """A copy of vllm-ascend's real files in which a test may change some before they are imported."""
    return stand_ins.copied(FOLDER, REAL, tmp_path)


@pytest.fixture
def ascend(monkeypatch, request):
    """vllm-ascend's modules, importable, its kernel in Triton's interpreter; no plugin chosen."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    folder = request.getfixturevalue("edited") if "edited" in request.fixturenames else FOLDER
    with stand_ins.engine(folder, "vllm_ascend", REAL, GIVEN):
        yield
        integration.uninstall()
        for one in [one for one in sys.meta_path if isinstance(one, OnImport)]:
            one.cancel()


def packed(heads, n, dtype):
    hk, hv, dk, dv = heads
    qkvz, ba = torch.randn(n, 2 * hk * dk + 2 * hv * dv), torch.randn(n, 2 * hv)
    return qkvz.to(dtype), ba.to(dtype)


def same(before, after):
    assert len(before) == len(after) == 4
    for one, other in zip(before, after):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        bits = torch.int16 if one.element_size() == 2 else torch.int32
        assert torch.equal(one.view(bits), other.view(bits))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_what_vllm_ascend_s_own_kernel_puts_out(ascend, heads, dtype):
    given = packed(heads, 8, dtype)
    before = getattr(importlib.import_module(MODULE), NAME)(*given, *heads)
    with integration.installed():
        ours = getattr(importlib.import_module(MODULE), NAME)
        assert ours is gdn.fused_qkvzba_split_reshape_cat
        same(before, ours(*given, *heads))
    assert getattr(importlib.import_module(MODULE), NAME) is not ours


@pytest.mark.parametrize("imported", ["before", "after"])
def test_the_layer_that_has_it_by_name(ascend, imported):
    if imported == "before":
        importlib.import_module(LAYER)
    integration.install()
    integration.install()
    layer = importlib.import_module(LAYER)
    assert getattr(layer, NAME) is gdn.fused_qkvzba_split_reshape_cat
    integration.uninstall()
    integration.uninstall()
    assert not integration.is_installed()
    original = getattr(importlib.import_module(MODULE), NAME)
    assert getattr(layer, NAME) is original is not gdn.fused_qkvzba_split_reshape_cat


@pytest.mark.interpreter
def test_the_layers_own_forward(ascend, monkeypatch):
    """`AscendGatedDeltaNetAttention.forward`: what its attention core gets, and its output."""
    layer = importlib.import_module(LAYER)
    heads, n = (4, 8, 32, 32), 5
    qkvz, ba = packed(heads, n, torch.bfloat16)
    seen = []

    def core(mixed_qkv, b, a, out, prefix, flag):
        seen.append([t.clone() for t in (mixed_qkv, b, a)])
        out.copy_(mixed_qkv[:, : out[0].numel()].reshape(out.shape))

    ops = SimpleNamespace(qwen_gdn_attention_core=core)
    monkeypatch.setattr(torch.ops, "vllm", ops, raising=False)
    self = SimpleNamespace(
        gqa_interleaved_layout=True,
        in_proj_qkvz=lambda x: (qkvz, None),
        in_proj_ba=lambda x: (ba, None),
        norm=lambda core, z: core * z,
        out_proj=lambda x: (x, None),
        prefix="layer",
        tp_size=1,
        **dict(zip(("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"), heads)),
    )
    outputs = []
    for on in (False, True):
        if on:
            integration.install()
        outputs.append(torch.zeros(n, heads[1] * heads[3], dtype=torch.bfloat16))
        layer.AscendGatedDeltaNetAttention.forward(
            self, torch.zeros(n, 16, dtype=torch.bfloat16), outputs[-1]
        )
    for before, after in zip(*seen):
        assert torch.equal(before, after)
    assert torch.equal(*outputs)
    assert outputs[0].abs().sum() > 0


@pytest.mark.parametrize("chosen", [None, "", "ascend,gdn", "ascend, gdn_ascendant"])
def test_the_plugin_does_nothing_unasked(ascend, monkeypatch, chosen):
    if chosen is not None:
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
    integration.plugin()
    importlib.import_module(MODULE)
    assert not integration.is_installed()


@pytest.mark.parametrize("imported", ["before", "after"])
def test_the_plugin_when_chosen(ascend, monkeypatch, imported):
    monkeypatch.setenv("VLLM_PLUGINS", "ascend,ascend_model,gdn_ascend")
    if imported == "before":
        importlib.import_module(LAYER)
    integration.plugin()
    integration.plugin()
    assert integration.is_installed() == (imported == "before")
    assert getattr(importlib.import_module(LAYER), NAME) is gdn.fused_qkvzba_split_reshape_cat
    assert integration.is_installed()


def test_gdn_declares_the_entry_point():
    found = [one for one in entry_points(group="vllm.general_plugins") if one.name == integration.PLUGIN]
    wanted = EntryPoint(integration.PLUGIN, "gdn.integrations.vllm_ascend:plugin", "vllm.general_plugins")
    assert [(one.name, one.value) for one in found] == [(wanted.name, wanted.value)]
    assert wanted.load() is integration.plugin


@pytest.mark.parametrize("name", integration.SOURCES)
def test_changed_source_is_refused(edited, ascend, name):
    file = edited / (MODULE.replace(".", "/") + ".py")
    text = file.read_text()
    at = text.index(f"def {name}(")
    file.write_text(text[:at] + text[at:].replace("+ 1", "+ 2", 1).replace("mixed_qkvz,", "mixed_qkvz ,", 1))
    with pytest.raises(UnknownEngine, match=rf"does not know this .*\.{name} "):
        integration.install()
    assert not integration.is_installed()
    assert getattr(sys.modules[MODULE], NAME) is not gdn.fused_qkvzba_split_reshape_cat


def test_another_release_is_refused(edited, ascend):
    metadata = edited / "vllm_ascend-0.23.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 0.23.0", "Version: 0.31.0", 1))
    with pytest.raises(UnknownEngine, match=r"vllm_ascend 0\.31\.0; it knows 0\.23"):
        integration.install()
    assert not integration.is_installed()
    integration.install(any_release=True)
    assert integration.is_installed()
