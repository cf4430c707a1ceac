"""One step of a tiny layer on a CPU, through vLLM's own path and through gdn's, held to each other."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from gdn.integrations.trial import Tiny
from gdn.integrations.vllm_cpu import ATTENTION

WITHIN = 2**-6  # of a tensor's norm: both round to bf16, vLLM more often


@dataclass(frozen=True)
class Step:
    """The layer, and a mixed batch: how many tokens each sequence has, the decodes first."""

    interleaved: bool = True
    num_k_heads: int = 2
    num_v_heads: int = 4
    head_dim: int = 64
    tokens: tuple[int, ...] = (1, 1, 5, 70)
    decodes: int = 2
    fresh: tuple[int, ...] = (2,)  # which sequences begin
    slots: tuple[int, ...] = (3, 1, 5, 2)
    gate: str = "silu"
    tp_size: int = 1

    def taken(self, layer: type, forward_cpu: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        """Output and both states afterwards, through the method `forward_cpu` of the class `layer`."""
        attention = importlib.import_module(ATTENTION)
        attention.register_cpu_gdn_attention_ops()
        norm = importlib.import_module("vllm.model_executor.layers.layernorm").RMSNormGated
        pack = importlib.import_module("vllm.model_executor.layers.utils").dispatch_cpu_unquantized_gemm
        override = importlib.import_module("vllm.forward_context").override_forward_context
        made = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=made)

        HK, HV, D, N = self.num_k_heads, self.num_v_heads, self.head_dim, sum(self.tokens)
        C = (2 * HK + HV) * D
        conv1d = torch.nn.Module()
        conv1d.weight = torch.nn.Parameter((random(C, 1, 4) * 0.3).bfloat16(), requires_grad=False)
        conv1d.bias = None
        pack(conv1d, remove_weight=False)
        weight = (1 + random(D) * 0.1).bfloat16()
        qkvz, ba = random(N, C + HV * D).bfloat16(), random(N, 2 * HV).bfloat16()
        tiny = Tiny(
            layer,
            num_k_heads=HK * self.tp_size,
            num_v_heads=HV * self.tp_size,
            head_k_dim=D,
            head_v_dim=D,
            key_dim=HK * D * self.tp_size,
            value_dim=HV * D * self.tp_size,
            tp_size=self.tp_size,
            tp_rank=0,
            num_spec=0,
            prefix="layer",
            activation="silu",
            gqa_interleaved_layout=self.interleaved,
            conv1d=conv1d,
            A_log=random(HV),
            dt_bias=random(HV).bfloat16(),
            norm=_Norm(
                norm, weight=weight, eps=1e-6, activation=self.gate, group_size=None, norm_before_gate=True
            ),
            kv_cache=self._pages(random, attention.is_conv_state_dim_first()),
            in_proj_qkvz=lambda x: (qkvz, None),
            in_proj_ba=lambda x: (ba, None),
            out_proj=lambda x: (x, None),
        )
        metadata = self._metadata(attention.GDNAttentionMetadata)
        context = SimpleNamespace(no_compile_layers={"layer": tiny}, attn_metadata={"layer": metadata})
        with override(context):
            out = forward_cpu(tiny, torch.zeros(N, 1, dtype=torch.bfloat16))
        return (out, *tiny.kv_cache)

    def _metadata(self, kind: type) -> Any:
        """What vLLM's builder of metadata says of the batch."""
        tokens, sequences = torch.tensor([0, *self.tokens]), len(self.tokens)
        return kind(
            num_prefills=sequences - self.decodes,
            num_prefill_tokens=sum(self.tokens[self.decodes :]),
            num_decodes=self.decodes,
            num_decode_tokens=self.decodes,
            num_spec_decodes=0,
            num_spec_decode_tokens=0,
            num_actual_tokens=sum(self.tokens),
            has_initial_state=torch.tensor([r not in self.fresh for r in range(sequences)]),
            non_spec_query_start_loc=tokens.cumsum(0, dtype=torch.int32),
            non_spec_state_indices_tensor=torch.tensor(self.slots, dtype=torch.int32),
        )

    def _pages(self, random: Callable[..., torch.Tensor], dim_first: bool) -> list[torch.Tensor]:
        """Both states as vLLM views them: in one page a slot, the recurrent one behind the other."""
        D, HV = self.head_dim, self.num_v_heads
        C = (2 * self.num_k_heads + HV) * D
        slots, conv = max(self.slots) + 2, 3 * C
        pages = random(slots, conv // 2 + HV * D * D)  # of f32
        windows = random(slots, C, 3) if dim_first else random(slots, 3, C)
        kept = pages.view(torch.bfloat16)[:, :conv].unflatten(1, windows.shape[1:])
        kept.copy_(windows)
        return [kept, pages[:, conv // 2 :].unflatten(1, (HV, D, D))]


class _Norm(Tiny):
    """vLLM's norm without its configuration."""

    def __call__(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.forward_native(x, z)


def difference(
    layer: type, own: Callable[..., Any], ours: Callable[..., Any], step: Step | None = None
) -> str | None:
    """How output or states of `step` differ, as the end of a sentence; None where they do not.

    `own` and `ours` are the methods `forward_cpu` of the class `layer`. Without a step: the default one, of
    both packings. Inside `trial.on_the_cpu()`.
    """
    for one in (Step(interleaved=True), Step(interleaved=False)) if step is None else (step,):
        try:
            results = [one.taken(layer, method) for method in (own, ours)]
        except Exception as error:  # whatever a release that nobody here has seen may do
            return f"it ended with {type(error).__name__}: {error}"
        for name, theirs, found in zip(("output", "conv_state", "recurrent state"), *results, strict=True):
            if theirs.shape != found.shape:
                return f"the {name} has shape {tuple(found.shape)}, it is {tuple(theirs.shape)}"
            off = ((found.double() - theirs.double()).norm() / theirs.double().norm()).item()
            if not off <= WITHIN:
                return f"the {name} is off by {off:.1e} of its norm"
    return None
