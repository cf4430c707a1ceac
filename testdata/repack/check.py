"""Shows on torch's own GEMMs that repacked projections are views of what the original gives through the split.

    python check.py GDN        # GDN is the built command

A randomly initialised `Qwen3NextForCausalLM` (bf16, 4+8 heads of 32) is saved in shards by transformers and repacked, with
either kind of names. Then, for each Gated DeltaNet layer and some numbers of tokens: what the layer's own `forward` makes
of random hidden states, against slices of `hidden @ weight.T` with the repacked weights. Says for each whether all bits are
the same, and fails if not.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from make import recording  # noqa: E402
from repack.make import config  # noqa: E402


def parts_of(layer, hidden):
    split, conv = [], []
    original = layer.fix_query_key_value_ordering
    layer.fix_query_key_value_ordering = recording(original, split)
    with mock.patch.object(
        modeling_qwen3_next, "causal_conv1d_fn", recording(modeling_qwen3_next.causal_conv1d_fn, conv)
    ):
        layer(hidden)
    layer.fix_query_key_value_ordering = original
    [(_, (_, _, _, z, b, a))], [((mixed_qkv, *_), _)] = split, conv
    return {"mixed_qkv": mixed_qkv.transpose(1, 2), "z": z.flatten(2), "b": b, "a": a}


def main(gdn):
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    model = Qwen3NextForCausalLM(config((4, 8, 32, 32), num_hidden_layers=4)).to(torch.bfloat16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, modeling_qwen3_next.Qwen3NextGatedDeltaNet)}
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        model.save_pretrained(source, max_shard_size="100KB")
        for names in ("fused", "separate"):
            out = Path(folder) / names
            subprocess.run([gdn, "repack", source, "-o", out, "--names", names], check=True)
            tensors = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
            for name, layer in layers.items():
                for tokens in (1, 7, 64, 300):
                    hidden = torch.randn(1, tokens, layer.hidden_size).to(torch.bfloat16)
                    wanted = parts_of(layer, hidden)

                    def project(module):
                        return torch.nn.functional.linear(hidden, tensors[f"{name}.{module}.weight"])

                    if names == "fused":
                        qkvz, ba = project("in_proj_qkvz"), project("in_proj_ba")
                        qkv = wanted["mixed_qkv"].shape[-1]
                        got = {"mixed_qkv": qkvz[..., :qkv], "z": qkvz[..., qkv:]}
                        got |= dict(zip(("b", "a"), ba.chunk(2, dim=-1)))
                    else:
                        modules = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
                        got = dict(zip(("mixed_qkv", "z", "b", "a"), map(project, modules)))
                    same = {part: torch.equal(got[part], wanted[part]) for part in wanted}
                    different += not all(same.values())
                    print(f"{names} {name} {tokens} tokens: {'same bits' if all(same.values()) else same}")
    sys.exit(different > 0)


if __name__ == "__main__":
    main(sys.argv[1])
