#!/usr/bin/env python3
"""Decode on a GPU against SGLang's chains of launches, its and FlashInfer's recurrence alone, and copies of the state's bytes, in one process.

    pip install ./python flashinfer-python==0.7.2 nvidia-cutlass-dsl[cu13] && python python/tests/peers.py sglang
    python benches/gpu/decode.py --sglang peers/sglang-0.5.23 --csv OUT.csv --svg OUT.svg

Every subject is first held to float64. Each is then captured in a CUDA graph of calls on slots of their own, together larger than the
second-level cache; graphs are replayed in turns, and a figure is the median over the turns, in microseconds a call. SGLang's files are
loaded from where they are; what they import of the rest of SGLang is stood in for, and its kernels are launched as it launches them on this device.
FlashInfer is left out where it cannot be imported. gdn is launched programmatically, each call behind another one that lets it start
early. A GEMM lets nobody: for few sequences gdn and SGLang's chain are measured behind the layer's own, too (torch.mm, a hidden size of
2048), as what they add to the time of that GEMM alone. A recurrence alone begins with the convolution's results and ends before the norm.
"""

import argparse
import contextlib
import csv
import datetime
import importlib.util
import itertools
import math
import sys
import types
from pathlib import Path

import gdn
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "python/tests")]

import oracle_layer
from bars import svg
from copies import copy_in_pieces, triton_copy
from graphs import bits, graph_of, medians
from peers import StandIns


#: Tokens of a sequence where several are decoded at once: a draft, verified.
MOST_TOKENS = 4
#: How many sequences are held to float64.
CHECKED = 4
COPY = "copy of the states"
#: The layer's hidden size where a GEMM comes before, and how many sequences there are then at most.
HIDDEN = 2048
MOST_BEHIND = 16
GEMM = "GEMM alone"
BEHIND = ", behind a GEMM"


class Peer(StandIns):
    """SGLang's modules by their names: those that are needed from its files, stand-ins for all others."""

    REAL = (
        "kernels.ops.attention.fla.op",
        "kernels.ops.attention.fla.utils",
        "kernels.ops.attention.fla.fused_recurrent",
        "kernels.ops.attention.fla.layernorm_gated",
        "kernels.ops.attention.triton_gdn_fused_proj",
        "kernels.ops.mamba.causal_conv1d_triton",
    )

    def __init__(self, folder):
        super().__init__({"sglang"})
        self.folder = Path(folder)

    def find_spec(self, name, path=None, target=None):
        if name.removeprefix("sglang.") in self.REAL:
            return importlib.util.spec_from_file_location(name, self.folder / (name.replace(".", "/") + ".py"))
        return super().find_spec(name, path, target)

    def create_module(self, spec):
        known = {
            "is_arch_support_pdl": lambda: torch.cuda.get_device_capability() >= (9, 0),
            "device_context": torch.cuda.device,
            "cdiv": triton.cdiv,
            "next_power_of_2": triton.next_power_of_2,
            "torch_release": tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]),
        }
        module = super().create_module(spec)
        other = module.__getattr__
        module.__getattr__ = lambda name: known.get(name) or other(name)
        return module

    def load(self):
        sys.meta_path.insert(0, self)
        modules = [importlib.import_module(f"sglang.{name}") for name in self.REAL]
        sys.meta_path.remove(self)
        return types.SimpleNamespace(**{name: getattr(module, name) for module in modules for name in (
            "fused_qkvzba_split_reshape_cat", "fused_qkvzba_causal_conv1d_update_contiguous", "causal_conv1d_update",
            "fused_recurrent_gated_delta_rule_packed_decode", "rms_norm_gated") if hasattr(module, name)})


class Case:
    """A layer, its states in slots, and the tensors of calls, each on slots of its own."""

    def __init__(self, heads, batch, state_dtype, packing):
        torch.manual_seed(0)
        self.heads, self.batch = heads, batch
        self.numbers = oracle_layer.Numbers(heads, packing)
        hk, hv, dk, dv = heads
        channels = oracle_layer.channels(heads)
        self.state_bytes = hv * dv * dk * state_dtype.itemsize
        self.calls = max(2, min(64, (256 << 20) // (batch * self.state_bytes)))
        slots = self.calls * batch
        made = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.qkvz, self.ba = made(MOST_TOKENS * batch, 2 * hk * dk + 2 * hv * dv), made(MOST_TOKENS * batch, 2 * hv)
        self.weights = oracle_layer.Weights(
            made(channels, 4) * 0.3, None, torch.rand(hv, device="cuda"), torch.rand(hv, device="cuda"), 1 + 0.1 * made(dv)
        )
        self.conv = made(slots, channels, 3)
        self.state = torch.empty(slots, hv, dv, dk, device="cuda", dtype=state_dtype).normal_(std=0.1)
        self.order = torch.randperm(slots, device="cuda").to(torch.int32).view(self.calls, batch)
        # What a recurrence alone is given: the convolution's results, b and a.
        self.convolved, self.b, self.a = made(batch, channels), made(batch, hv), made(batch, hv)

    def packed(self, tokens):
        """The projections of so many tokens of each sequence."""
        return self.qkvz[: tokens * self.batch], self.ba[: tokens * self.batch]

    def core_bytes(self, tokens=1):
        """What a call must move: states and windows there and back, weights, projections, outputs."""
        hk, hv, dk, dv = self.heads
        channels = oracle_layer.channels(self.heads)
        a_token = channels + hv * dv + 2 * hv + hv * dv
        return self.batch * (2 * self.state_bytes + 2 * 3 * channels * 2 + tokens * a_token * 2) + channels * 4 * 2

    def exact(self, tokens):
        """Of the first sequences of the first call, in float64: outputs and states after so many tokens of each."""
        slots = self.order[0].tolist()[:CHECKED]
        parts = oracle_layer.unpacked([one[: tokens * len(slots)].cpu() for one in self.packed(tokens)], self.numbers)
        weights = on_cpu(self.weights)
        done = [
            oracle_layer.sequence(
                self.numbers, weights, [part[tokens * r : tokens * (r + 1)] for part in parts], self.conv[slot].cpu(), self.state[slot].cpu()
            )
            for r, slot in enumerate(slots)
        ]
        return torch.cat([y for y, _, _ in done]), torch.stack([states[-1] for _, _, states in done])

    def exact_recurrence(self):
        """The same of a recurrence alone."""
        weights = on_cpu(self.weights).doubled()
        done = [
            oracle_layer.recurrence(
                self.numbers, weights, *(one[r].double().cpu() for one in (self.convolved, self.b, self.a)), self.state[slot].double().cpu()
            )
            for r, slot in enumerate(self.order[0].tolist()[:CHECKED])
        ]
        return torch.stack([o for o, _ in done]), torch.stack([state for _, state in done])


def on_cpu(weights):
    return oracle_layer.Weights(*(None if one is None else one.cpu() for one in vars(weights).values()))


# ---- subjects: functions of a call's number, which write to its slots and return its outputs


def ours(case, tokens=1):
    _, hv, _, dv = case.heads
    layer = gdn.Layer(case.heads, case.numbers.packing, **vars(case.weights))
    packed, out = case.packed(tokens), torch.empty(tokens * case.batch, hv, dv, device="cuda", dtype=torch.bfloat16)
    return lambda i: layer.decode(packed, case.conv, case.state, tokens_per_sequence=tokens, state_indices=case.order[i], out=out)


def chain(case, sglang, launches):
    hk, hv, dk, dv = case.heads
    w, channels = case.weights, oracle_layer.channels(case.heads)
    qkvz, ba = case.packed(1)
    core = torch.empty(case.batch, 1, hv, dv, device="cuda", dtype=torch.bfloat16)

    def run(i):
        slots = case.order[i]
        if launches == 3:
            mixed, z, b, a = sglang.fused_qkvzba_causal_conv1d_update_contiguous(
                qkvz, ba, case.conv, w.conv_weight, None, slots, qkv_dim=channels, v_dim=hv * dv, num_v_heads=hv,
                head_v_dim=dv, activation="silu")
        else:
            mixed, z, b, a = sglang.fused_qkvzba_split_reshape_cat(qkvz, ba, hk, hv, dk, dv)
            mixed = sglang.causal_conv1d_update(mixed, case.conv, w.conv_weight, None, "silu", conv_state_indices=slots)
        sglang.fused_recurrent_gated_delta_rule_packed_decode(
            mixed, a, b, w.A_log, w.dt_bias, dk**-0.5, case.state, core, slots, use_qk_l2norm_in_kernel=True)
        return sglang.rms_norm_gated(
            x=core.view(-1, dv), weight=w.norm_weight, bias=None, z=z.reshape(-1, dv), eps=1e-6, is_rms_norm=True
        ).view(case.batch, hv, dv)

    return run


def sglang_recurrence(case, sglang):
    _, hv, dk, dv = case.heads
    w, core = case.weights, torch.empty(case.batch, 1, hv, dv, device="cuda", dtype=torch.bfloat16)

    def run(i):
        sglang.fused_recurrent_gated_delta_rule_packed_decode(
            case.convolved, case.a, case.b, w.A_log, w.dt_bias, dk**-0.5, case.state, core, case.order[i], use_qk_l2norm_in_kernel=True)
        return core[:, 0]

    return run


def flashinfer_recurrence(case, decode):
    hk, hv, dk, dv = case.heads
    w, out = case.weights, torch.empty(case.batch, 1, hv, dv, device="cuda", dtype=torch.bfloat16)
    q, k, v = case.convolved.split([hk * dk, hk * dk, hv * dv], dim=1)
    q, k, v = (one.reshape(case.batch, 1, -1, dk).contiguous() for one in (q, k, v))
    slots = [one.clone() for one in case.order]  # it wants them aligned

    def run(i):
        decode(
            q, k, v, None, w.A_log, case.a[:, None], w.dt_bias, case.b[:, None], dk**-0.5, out, True, initial_state=case.state,
            initial_state_indices=slots[i], backend="flashinfer")
        return out[:, 0]

    return run


def copies(case):
    """As many bytes as the states of a call have, read once and written once, in the ways of which one is the fastest."""
    other = torch.empty_like(case.state)
    part = lambda all_, i: bits(all_[i * case.batch : (i + 1) * case.batch])
    found = {"torch": lambda src, dst: dst.copy_(src), "Triton": triton_copy}
    if case.batch * case.state_bytes > 512 << 20:
        found["torch, 512 MiB at a time"] = copy_in_pieces
    return {f"{COPY}, {how}": lambda i, one=one: one(part(case.state, i), part(other, i)) for how, one in found.items()}


def behind_gemm(case, run):
    """The projection that comes before a call in a layer, into the tensor that the call reads, and the call."""
    features = case.qkvz.shape[1]
    weight = torch.empty(HIDDEN, features, device="cuda", dtype=torch.bfloat16).normal_(std=HIDDEN**-0.5)
    hidden = torch.randn(case.batch, HIDDEN, device="cuda", dtype=torch.bfloat16)
    qkvz, _ = case.packed(1)

    def both(i):
        torch.mm(hidden, weight, out=qkvz)
        return run(i)

    return both


def subjects(case, sglang, flashinfer):
    """By name: what runs, and what it is held to in float64."""
    found = {"gdn": (ours(case), lambda: case.exact(1))}
    if case.numbers.packing == "contiguous":
        found[f"gdn, {MOST_TOKENS} tokens"] = ours(case, MOST_TOKENS), lambda: case.exact(MOST_TOKENS)
    if sglang:
        launches = 3 if case.numbers.packing == "contiguous" else 4
        found[f"SGLang, {launches} launches"] = chain(case, sglang, launches), lambda: case.exact(1)
        found["SGLang's recurrence"] = sglang_recurrence(case, sglang), case.exact_recurrence
    if flashinfer:
        found["FlashInfer's recurrence"] = flashinfer_recurrence(case, flashinfer), case.exact_recurrence
    if case.batch <= MOST_BEHIND:
        # A call reads what the GEMM writes: there is no float64 for that here, and the call alone was held to it.
        chains = [name for name in found if name == "gdn" or "launches" in name]
        found |= {name + BEHIND: (behind_gemm(case, found[name][0]), None) for name in chains}
        found[GEMM] = behind_gemm(case, lambda i: None), None
    return found | {name: (run, None) for name, run in copies(case).items()}


def error(got, right):
    return ((got.double().cpu() - right).norm() / right.norm()).item()


def checked(case, name, run, exact):
    """The errors of outputs and states of the first sequences; states are as they were afterwards."""
    kept = case.conv.clone(), case.state.clone()
    right, state = exact()
    got = run(0)[: len(right)]
    torch.cuda.synchronize()
    errors = error(got, right), error(case.state[case.order[0][: len(state)].long()], state)
    case.conv.copy_(kept[0]), case.state.copy_(kept[1])
    assert max(errors) < 2e-2, f"{name} is off float64 by {errors}"
    return errors


def measure(case, sglang, flashinfer, turns):
    results, graphs = {}, {}
    for name, (run, exact) in subjects(case, sglang, flashinfer).items():
        try:
            results[name] = checked(case, name, run, exact) if exact else ("", "")
            turn = itertools.cycle(range(case.calls))
            graphs[name] = graph_of(lambda run=run, turn=turn: run(next(turn)), case.calls)
        except Exception as failed:  # a peer that does not run is said so, and the others go on
            print(f"{name}: {type(failed).__name__}: {str(failed)[:300]}", flush=True)
    took = medians(graphs, turns, case.calls)
    added = lambda name: took[name] - (took.get(GEMM, math.nan) if name.endswith(BEHIND) else 0)
    return {name: (added(name), *results[name]) for name in took}


def share_of_copy(case, figures):
    """gdn's bytes a second over those of the fastest copy."""
    best = min(figure[0] for name, figure in figures.items() if name.startswith(COPY))
    return case.core_bytes() / figures["gdn"][0] / (2 * case.batch * case.state_bytes / best)


def bars(rows):
    """gdn, SGLang's chain, and what moves the states alone, for the packing that SGLang has the shorter chain for."""
    groups = {}
    for heads, state, packing, batch, subject, micros, *_ in rows:
        if packing == "contiguous":
            groups.setdefault(f"{heads}, {state}, B = {batch}", {})[subject] = float(micros)
    for figures in groups.values():
        best = min((name for name in figures if name.startswith(COPY)), key=figures.get, default=None)
        for name in [name for name in figures if (name.startswith(COPY) and name != best) or "tokens" in name or "GEMM" in name]:
            del figures[name]
    return groups


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", help="the folder of SGLang 0.5.23's files")
    parser.add_argument("--csv", help="where figures go")
    parser.add_argument("--svg", help="where bars go")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--heads", default="16/32,4/8,16/48", help="key and value heads of 128")
    parser.add_argument("--batch", default="1,4,16,64,256,512")
    arguments = parser.parse_args()
    sglang = Peer(arguments.sglang).load() if arguments.sglang else None
    about = [str(datetime.date.today()), torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}"]
    flashinfer = None
    with contextlib.suppress(ImportError):
        module = importlib.import_module("flashinfer.gdn_decode")
        flashinfer = module.gated_delta_rule_decode_pretranspose
        about.append(f"FlashInfer {importlib.import_module('flashinfer.version').__version__}")
    rows = []
    for pair in arguments.heads.split(","):
        hk, hv = map(int, pair.split("/"))
        for dtype in (torch.float32, torch.bfloat16):
            for batch in map(int, arguments.batch.split(",")):
                for packing in ("contiguous", "interleaved"):
                    if packing == "interleaved" and pair != "16/32":
                        continue
                    case = Case((hk, hv, 128, 128), batch, dtype, packing)
                    figures = measure(case, sglang, flashinfer, arguments.turns)
                    name = str(dtype).removeprefix("torch.")
                    line = ", ".join(f"{subject} {figure[0]:.2f}" for subject, figure in figures.items())
                    print(f"{pair} {name} {packing} B={batch}: {line}; bytes a second, of the copy's: {share_of_copy(case, figures):.3f}", flush=True)
                    for subject, (micros, out_error, state_error) in figures.items():
                        rows.append([pair, name, packing, batch, subject, f"{micros:.3f}", out_error, state_error])
                    del case
                    torch.cuda.empty_cache()
                    write(arguments, rows, ", ".join(about))


def write(arguments, rows, about):
    """What there is so far: a run that is ended early has left its figures."""
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"# {about}"])
            writer.writerow(["heads", "state", "packing", "batch", "subject", "microseconds", "error of out", "error of state"])
            writer.writerows(rows)
    if arguments.svg:
        title = "Decode of one token: gdn and SGLang's chain, projections in, normed heads out; and recurrences alone"
        Path(arguments.svg).write_text(svg(title, f"{about}; heads of 128, bf16", bars(rows)))


if __name__ == "__main__":
    main()
