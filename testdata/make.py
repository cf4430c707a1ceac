"""Makes the test data: packed projections and their split, as transformers' own layers do it.

Each case builds one Gated DeltaNet layer of transformers (random weights, random hidden states), runs the layer's
own `forward`, and records what passes through it. The split is never worked out here:

  interleaved  `Qwen3NextGatedDeltaNet`: `mixed_qkvz` and `mixed_ba` are the arguments of its
               `fix_query_key_value_ordering`; `z`, `b`, `a` are what that returned.
  contiguous   `Qwen3_5GatedDeltaNet`: `z`, `b`, `a` are the outputs of `in_proj_z`, `in_proj_b`, `in_proj_a`;
               `mixed_qkvz` = cat(in_proj_qkv, in_proj_z) and `mixed_ba` = cat(in_proj_b, in_proj_a).
  both         `mixed_qkv` is what `forward` handed to its causal convolution.

Run, in this folder, with Python 3.11:

    pip install -r requirements.txt
    python make.py [FOLDER]        # writes into FOLDER, by default this one

The same machine writes the same bytes each time. Another processor may round the projections otherwise, which changes
the values in both files of a pair alike.
"""

import json
import struct
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import transformers
from safetensors.torch import save
from transformers import Qwen3_5Config, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

SEED = 0
HEADS = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")  # of Qwen3.5
BF16, F32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    name: str
    packing: str
    heads: tuple[int, int, int, int]  # see HEADS
    shape: tuple[int, ...]  # of the tokens: (N,) or (batch, seq)
    dtype: torch.dtype = BF16
    ba_dtype: torch.dtype | None = None  # where it is not `dtype`


CASES = [
    Case("qwen3-next", "interleaved", (16, 32, 128, 128), (7,)),
    Case("r1-f32", "interleaved", (4, 4, 16, 16), (5,), F32),
    Case("r2-ba-f32", "interleaved", (4, 8, 32, 32), (6,), BF16, F32),
    Case("r3-bf16", "interleaved", (4, 12, 32, 32), (9,)),
    Case("r4-one-token", "interleaved", (2, 8, 64, 64), (1,)),
    Case("dk24-dv40", "interleaved", (3, 6, 24, 40), (11,)),
    Case("batched", "interleaved", (4, 8, 32, 32), (2, 5)),
    Case("qwen3.5-contiguous", "contiguous", (16, 48, 128, 128), (3,)),
    Case("contiguous-dk24-dv40", "contiguous", (3, 6, 24, 40), (4,)),
]


def config_of(cls, heads, **rest):
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    return cls(**dict(zip(names, heads)), **rest)


def recording(function, calls):
    """`function`, with (arguments, result) of each call appended to `calls`."""

    def recorded(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((args, result))
        return result

    return recorded


def run(case):
    """One forward pass: the name of the layer's class, the packed inputs, and the outputs expected of the split."""
    interleaved = case.packing == "interleaved"
    modeling = modeling_qwen3_next if interleaved else modeling_qwen3_5
    layer_cls = modeling.Qwen3NextGatedDeltaNet if interleaved else modeling.Qwen3_5GatedDeltaNet
    config_cls = Qwen3NextConfig if interleaved else Qwen3_5TextConfig

    torch.manual_seed(SEED)
    layer = layer_cls(config_of(config_cls, case.heads, hidden_size=256), layer_idx=0).to(case.dtype)
    batch, seq = (1, *case.shape)[-2:]
    hidden = torch.randn(batch, seq, layer.hidden_size).to(case.dtype)

    calls = {name: [] for name in ("split", "conv", *PROJECTIONS)}
    if interleaved:
        layer.fix_query_key_value_ordering = recording(layer.fix_query_key_value_ordering, calls["split"])
        if case.ba_dtype:  # this projection, its weight and its input, in the other type
            layer.in_proj_ba.to(case.ba_dtype)
            layer.in_proj_ba.register_forward_pre_hook(lambda _, args: (args[0].to(case.ba_dtype),))
    else:
        for name in PROJECTIONS:
            proj = getattr(layer, name)
            proj.forward = recording(proj.forward, calls[name])
    with mock.patch.object(modeling, "causal_conv1d_fn", recording(modeling.causal_conv1d_fn, calls["conv"])):
        layer(hidden)

    [((mixed_qkv, *_), _)] = calls["conv"]
    mixed_qkv = mixed_qkv.transpose(1, 2)  # forward had put the features before the tokens
    if interleaved:
        [((mixed_qkvz, mixed_ba), (_, _, _, z, b, a))] = calls["split"]
    else:
        qkv, z, b, a = (calls[name][0][1] for name in PROJECTIONS)
        mixed_qkvz, mixed_ba = torch.cat((qkv, z), dim=-1), torch.cat((b, a), dim=-1)
        z = z.reshape(batch, seq, -1, layer.head_v_dim)

    packed = {"mixed_qkvz": mixed_qkvz, "mixed_ba": mixed_ba}
    expected = {"mixed_qkv": mixed_qkv, "z": z, "b": b, "a": a}
    for tensors in (packed, expected):
        for name, tensor in tensors.items():
            tensors[name] = tensor.reshape(*case.shape, *tensor.shape[2:]).contiguous()
    return layer_cls.__name__, packed, expected


def write(path, tensors, metadata):
    """safetensors' own bytes, but for the metadata's order, which it leaves to chance: here it is sorted."""
    data = save(tensors, metadata)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for case in CASES:
        layer, packed, expected = run(case)
        metadata = {name: str(number) for name, number in zip(HEADS, case.heads)} | {"packing": case.packing}
        metadata["source"] = f"transformers {transformers.__version__} {layer}, seed {SEED}"
        write(folder / f"{case.name}.safetensors", packed, metadata)
        write(folder / f"{case.name}.expected.safetensors", expected, metadata)

    heads = {case.name: case.heads for case in CASES}
    text = config_of(Qwen3_5TextConfig, heads["qwen3.5-contiguous"])
    config_of(Qwen3NextConfig, heads["qwen3-next"]).to_json_file(folder / "config.json")
    Qwen3_5Config(text_config=text.to_dict()).to_json_file(folder / "config-text.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
