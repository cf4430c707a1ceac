"""What a model says in float32, by Hugging Face transformers, of the tokens that an engine generated."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers


@cache
def _model(folder: str) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@cache
def _logprobs(folder: str, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """[tokens, vocabulary]: at each place, given everything before it."""
    with torch.no_grad():
        logits = _model(folder)(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    return logits.double().log_softmax(-1)


def errors(folder: str, prompts: list[list[int]], outputs: list[dict[str, Any]]) -> torch.Tensor:
    """[places]: by how much the worst of the logprobs that were given at a place is off."""
    worst = []
    for prompt, output in zip(prompts, outputs, strict=True):
        true = _logprobs(folder, tuple(prompt), tuple(output["tokens"])).tolist()
        for place, given in zip(true, output["logprobs"], strict=True):
            worst.append(max(abs(logprob - place[int(token)]) for token, logprob in given.items()))
    return torch.tensor(worst)
