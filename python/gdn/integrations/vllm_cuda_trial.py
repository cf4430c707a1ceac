"""Steps of a layer on CUDA, through vLLM's own path and through gdn's, held to each other.

The layer is the engine's own, with other weights and with states of a few slots, made for the trial.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from gdn.integrations.trial import Tiny
from gdn.integrations.vllm_cpu_trial import WITHIN

INDEX = "vllm.third_party.flash_linear_attention.ops.index"
#: What the layer's methods look at.
NAMES = (
    *("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim", "key_dim", "value_dim", "tp_size", "tp_rank"),
    *("prefix", "activation", "gqa_interleaved_layout", "layer_norm_epsilon", "disable_tp_for_ba_proj"),
    *("enable_packed_recurrent_decode", "gdn_decode_kernel", "num_spec", "chunk_gated_delta_rule"),
)


@dataclass(frozen=True)
class Step:
    """A batch: how many tokens each sequence has. `decodes` of them come first; or the first `drafts` have `num_spec + 1` tokens each."""

    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    decodes: int = 0
    drafts: int = 0
    fresh: tuple[int, ...] = ()  # which sequences begin
    accepted: tuple[int, ...] = ()  # of the drafts before
    gate: str | None = None
    seed: int = 0


DECODE = Step(tokens=(1, 1, 1), slots=(3, 1, 0), decodes=3)
MIXED = Step(tokens=(1, 1, 5, 70), slots=(3, 1, 5, 2), decodes=2, fresh=(2,))


def drafts(num_spec: int) -> tuple[Step, ...]:
    """Drafts alone, and beside a sequence that begins and one that goes on."""
    each, accepted = (num_spec + 1,) * 2, (1, num_spec + 1)
    alone = Step(tokens=each, slots=(3, 1), drafts=2, accepted=accepted)
    beside = Step(tokens=(*each, 1, 40), slots=(3, 1, 5, 2), drafts=2, accepted=accepted, fresh=(3,))
    return alone, beside


class Bench:
    """A layer for a step, and the states before and after it."""

    def __init__(self, layer: Any, step: Step, like: torch.Tensor, state_dtype: torch.dtype) -> None:
        self.module = sys.modules[_home(layer)]
        self.step, self.device, self.dtype = step, like.device, like.dtype
        generator = torch.Generator().manual_seed(step.seed)

        def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(like.device, like.dtype)

        given = {name: getattr(layer, name) for name in NAMES if hasattr(layer, name)}
        hk, hv = given["num_k_heads"] // given["tp_size"], given["num_v_heads"] // given["tp_size"]
        dk, dv = given["head_k_dim"], given["head_v_dim"]
        channels, self.heads = 2 * hk * dk + hv * dv, (hk, hv, dk, dv)
        self.drafted = given.get("num_spec", 0) + 1
        # The slots of a sequence's drafts lie one behind the other; 0 is nobody's.
        number = (max(step.slots) + 1) * self.drafted
        width = 3 + self.drafted - 1
        is_dim_first = self.module.is_conv_state_dim_first()
        windows = random(number, channels, width)
        pages = windows if is_dim_first else windows.transpose(1, 2).contiguous()
        room = torch.empty(number, hv * dv * dk + 64, dtype=state_dtype, device=like.device)
        state = room[:, : hv * dv * dk].unflatten(1, (hv, dv, dk))
        state.copy_(random(number, hv, dv, dk, scale=0.2))
        norm = layer.norm
        self.layer = Tiny(
            type(layer) if not isinstance(layer, Tiny) else vars(layer)["_layer"],
            **given,
            conv1d=SimpleNamespace(weight=random(channels, 1, 4, scale=0.3), bias=None),
            A_log=random(hv).float(),
            dt_bias=random(hv),
            norm=SimpleNamespace(
                weight=1 + random(dv, scale=0.1),
                bias=None,
                eps=norm.eps,
                group_size=None,
                norm_before_gate=True,
                activation=step.gate or norm.activation,
            ),
            kv_cache=[pages, state],
            _prefill_kernels_warmed_up=True,
        )
        rows = sum(step.tokens)
        self.projections = random(rows, channels + hv * dv), random(rows, 2 * hv)
        self.metadata = self._metadata()

    def slots_of(self, r: int) -> list[int]:
        first = self.step.slots[r] * self.drafted
        return [first + t if first else 0 for t in range(self.drafted)]

    def _metadata(self) -> Any:
        """What vLLM's builder of metadata says of the step."""
        step, sequences = self.step, len(self.step.tokens)
        rest = sequences - step.drafts
        lengths = torch.tensor(step.tokens)
        starts = torch.cat([torch.zeros(1), lengths[step.drafts :].cumsum(0)]).to(torch.int32)
        slots = torch.tensor([self.slots_of(r) for r in range(sequences)], dtype=torch.int32)
        begun = torch.tensor([r not in step.fresh for r in range(step.drafts, sequences)], dtype=torch.bool)
        drafted = int(lengths[: step.drafts].sum())
        given: dict[str, Any] = dict(
            num_prefills=rest - step.decodes,
            num_prefill_tokens=int(lengths[step.drafts + step.decodes :].sum()),
            num_decodes=step.decodes,
            num_decode_tokens=step.decodes,
            num_spec_decodes=step.drafts,
            num_spec_decode_tokens=drafted,
            num_actual_tokens=int(lengths.sum()),
        )
        if rest:
            given |= dict(
                non_spec_query_start_loc=starts, non_spec_state_indices_tensor=slots[step.drafts :, 0]
            )
        if step.drafts:
            masks = torch.arange(sequences) < step.drafts
            ends = torch.arange(step.drafts + 1, dtype=torch.int32) * self.drafted
            order = torch.arange(int(lengths.sum()))
            given |= dict(
                spec_sequence_masks=masks,
                spec_sequence_masks_cpu=masks,
                spec_query_start_loc=ends,
                spec_state_indices_tensor=slots[: step.drafts],
                spec_token_indx=order[:drafted],
                non_spec_token_indx=order[drafted:],
                num_accepted_tokens=torch.tensor(step.accepted, dtype=torch.int32),
                uniform_spec_sequence_length=self.drafted,
            )
        if rest > step.decodes:
            first = step.decodes
            tail = (starts[first:] - starts[first]).to(torch.int32)
            index = importlib.import_module(INDEX)
            home = importlib.import_module(self.module.GDNAttentionMetadata.__module__)
            chunk = self.module.FLA_CHUNK_SIZE
            nums, batch, offsets = home.compute_causal_conv1d_metadata(starts, device=self.device)
            given |= dict(
                has_initial_state=begun,
                prefill_query_start_loc=tail,
                prefill_state_indices=slots[step.drafts + first :, 0],
                prefill_has_initial_state=begun[first:],
                chunk_indices=index.prepare_chunk_indices(tail, chunk),
                chunk_offsets=index.prepare_chunk_offsets(tail, chunk),
                nums_dict=nums,
                batch_ptr=batch,
                token_chunk_offset_ptr=offsets,
            )
        placed = {
            name: one.to(self.device) if isinstance(one, torch.Tensor) and not name.endswith("_cpu") else one
            for name, one in given.items()
        }
        return self.module.GDNAttentionMetadata(**placed)

    def run(self, method: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
        """Output and both states afterwards; the states are then as they were."""
        override = importlib.import_module("vllm.forward_context").override_forward_context
        before = [one.clone() for one in self.layer.kv_cache]
        _, hv, _, dv = self.heads
        out = torch.zeros(self.projections[0].shape[0], hv, dv, dtype=self.dtype, device=self.device)
        context = SimpleNamespace(attn_metadata={self.layer.prefix: self.metadata}, no_compile_layers={})
        with override(context):
            # vLLM's convolution of decodes writes over its input.
            method(self.layer, *(one.clone() for one in self.projections), out)
        after = tuple(one.clone() for one in self.layer.kv_cache)
        for one, kept in zip(self.layer.kv_cache, before, strict=True):
            one.copy_(kept)
        return out, *after


def _home(layer: Any) -> str:
    return (vars(layer)["_layer"] if isinstance(layer, Tiny) else type(layer)).__module__


def difference(
    layer: Any, theirs: Callable[..., Any], ours: Callable[..., Any], like: torch.Tensor
) -> str | None:
    """How output or states of a step differ, as the end of a sentence; None where they do not.

    `theirs` and `ours` are methods in place of `_forward_core_fused_norm_packed` of the class of `layer`. `like` has the device and the dtype of its
    projections.
    """
    num_spec = getattr(layer, "num_spec", 0)
    state_dtype = layer.get_state_dtype()[1]
    for step in (DECODE, MIXED, *(drafts(num_spec) if num_spec else ())):
        try:
            bench = Bench(layer, step, like, state_dtype)
            results = [bench.run(method) for method in (theirs, ours)]
        except Exception as error:  # whatever a release that nobody here has seen may do
            return f"it ended with {type(error).__name__}: {error}"
        for name, expected, found in zip(("output", "conv_state", "recurrent state"), *results, strict=True):
            off = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
            if not off <= WITHIN:
                return f"the {name} is off by {off:.1e} of its norm"
    return None
