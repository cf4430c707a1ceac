#!/usr/bin/env python3
"""Decode on a GPU against SGLang's chains of launches, its recurrence alone, and a copy of the state's bytes, in one process.

    pip install ./python && python python/tests/peers.py sglang
    python benches/gpu/decode.py --sglang peers/sglang-0.5.23 --csv OUT.csv

Every subject is first held to float64. Each is then captured in a CUDA graph of calls on slots of their own, together larger than the
second-level cache; graphs are replayed in turns, and a figure is the median over the turns, in microseconds a call. SGLang's files are
loaded from where they are; what they import of the rest of SGLang is stood in for, and its kernels are launched as it launches them on this device.
"""

import argparse
import csv
import datetime
import importlib.util
import itertools
import statistics
import sys
import types
from pathlib import Path

import gdn
import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches"), str(ROOT / "python/tests")]

import oracle_layer
from graphs import graph_of
from peers import StandIns


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
        self.heads, self.batch, self.packing = heads, batch, packing
        hk, hv, dk, dv = heads
        channels = oracle_layer.channels(heads)
        self.state_bytes = hv * dv * dk * state_dtype.itemsize
        self.calls = max(2, min(64, (256 << 20) // (batch * self.state_bytes)))
        slots = self.calls * batch
        made = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.qkvz, self.ba = made(batch, 2 * hk * dk + 2 * hv * dv), made(batch, 2 * hv)
        self.weights = oracle_layer.Weights(
            made(channels, 4) * 0.3, None, torch.rand(hv, device="cuda"), torch.rand(hv, device="cuda"), 1 + 0.1 * made(dv)
        )
        self.conv = made(slots, channels, 3)
        self.state = torch.empty(slots, hv, dv, dk, device="cuda", dtype=state_dtype).normal_(std=0.1)
        self.order = torch.randperm(slots, device="cuda").to(torch.int32).view(self.calls, batch)
        self.out = torch.empty(batch, hv, dv, device="cuda", dtype=torch.bfloat16)

    def exact(self, slots):
        numbers = oracle_layer.Numbers(self.heads, self.packing)
        weights = oracle_layer.Weights(*(None if one is None else one.cpu() for one in vars(self.weights).values()))
        parts = oracle_layer.unpacked((self.qkvz.cpu(), self.ba.cpu()), numbers)
        pick = lambda r: oracle_layer.sequence(
            numbers, weights, [part[r : r + 1] for part in parts], self.conv[slots[r]].cpu(), self.state[slots[r]].cpu()
        )
        done = [pick(r) for r in range(min(len(slots), 4))]
        return torch.stack([y[0] for y, _, _ in done]), torch.stack([states[0] for _, _, states in done])


def ours(case):
    layer = gdn.Layer(case.heads, case.packing, **vars(case.weights))

    def run(i):
        layer.decode((case.qkvz, case.ba), case.conv, case.state, state_indices=case.order[i], out=case.out)
        return case.out

    return run


def chain(case, sglang, launches):
    hk, hv, dk, dv = case.heads
    w, channels = case.weights, oracle_layer.channels(case.heads)
    core = torch.empty(case.batch, 1, hv, dv, device="cuda", dtype=torch.bfloat16)

    def run(i):
        slots = case.order[i]
        if launches == 3:
            mixed, z, b, a = sglang.fused_qkvzba_causal_conv1d_update_contiguous(
                case.qkvz, case.ba, case.conv, w.conv_weight, None, slots, qkv_dim=channels, v_dim=hv * dv, num_v_heads=hv,
                head_v_dim=dv, activation="silu")
        else:
            mixed, z, b, a = sglang.fused_qkvzba_split_reshape_cat(case.qkvz, case.ba, hk, hv, dk, dv)
            mixed = sglang.causal_conv1d_update(mixed, case.conv, w.conv_weight, None, "silu", conv_state_indices=slots)
        sglang.fused_recurrent_gated_delta_rule_packed_decode(
            mixed, a, b, w.A_log, w.dt_bias, dk**-0.5, case.state, core, slots, use_qk_l2norm_in_kernel=True)
        return sglang.rms_norm_gated(
            x=core.view(-1, dv), weight=w.norm_weight, bias=None, z=z.reshape(-1, dv), eps=1e-6, is_rms_norm=True
        ).view(case.batch, hv, dv)

    return run


def recurrence(case, sglang):
    _, hv, dk, dv = case.heads
    w = case.weights
    mixed = torch.randn(case.batch, oracle_layer.channels(case.heads), device="cuda", dtype=torch.bfloat16)
    a, b = (torch.randn(case.batch, hv, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    core = torch.empty(case.batch, 1, hv, dv, device="cuda", dtype=torch.bfloat16)
    return lambda i: sglang.fused_recurrent_gated_delta_rule_packed_decode(
        mixed, a, b, w.A_log, w.dt_bias, dk**-0.5, case.state, core, case.order[i], use_qk_l2norm_in_kernel=True)


def copy(case):
    """As many bytes as the states of a call have, read once and written once."""
    other = torch.empty_like(case.state)
    parts = [(other[i * case.batch : (i + 1) * case.batch], case.state[i * case.batch : (i + 1) * case.batch]) for i in range(case.calls)]
    return lambda i: parts[i][0].copy_(parts[i][1])


def error(got, right):
    return ((got.double().cpu() - right).norm() / right.norm()).item()


def measure(case, sglang, turns):
    subjects = {"gdn": ours(case), "copy of the states": copy(case)}
    if sglang:
        launches = 3 if case.packing == "contiguous" else 4
        subjects |= {f"SGLang, {launches} launches": chain(case, sglang, launches), "SGLang's recurrence": recurrence(case, sglang)}
    results, graphs = {}, {}
    for name, run in subjects.items():
        try:
            errors = ("", "")
            if name not in ("copy of the states", "SGLang's recurrence"):
                kept = case.conv.clone(), case.state.clone()
                right, state = case.exact(case.order[0].tolist())
                got, n = run(0), len(right)
                torch.cuda.synchronize()
                errors = error(got[:n], right), error(case.state[case.order[0][:n].long()], state)
                assert max(errors) < 2e-2, f"{name} is off float64 by {errors}"
                case.conv.copy_(kept[0]), case.state.copy_(kept[1])
                del kept
            results[name] = errors
            turn = itertools.cycle(range(case.calls))
            graphs[name] = graph_of(lambda run=run, turn=turn: run(next(turn)), case.calls)
        except Exception as failed:  # a peer that does not run is said so, and the others go on
            print(f"{name}: {type(failed).__name__}: {str(failed)[:300]}")
    times = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / case.calls)
    return {name: (statistics.median(all_), *results[name]) for name, all_ in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang", help="the folder of SGLang 0.5.23's files")
    parser.add_argument("--csv", help="where figures go")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--heads", default="16/32,4/8,16/48", help="key and value heads of 128")
    parser.add_argument("--batch", default="1,4,16,64,256,512")
    arguments = parser.parse_args()
    sglang = Peer(arguments.sglang).load() if arguments.sglang else None
    rows = []
    for pair in arguments.heads.split(","):
        hk, hv = map(int, pair.split("/"))
        for dtype in (torch.float32, torch.bfloat16):
            for batch in map(int, arguments.batch.split(",")):
                for packing in ("contiguous", "interleaved"):
                    if packing == "interleaved" and pair != "16/32":
                        continue
                    case = Case((hk, hv, 128, 128), batch, dtype, packing)
                    figures = measure(case, sglang, arguments.turns)
                    name = str(dtype).removeprefix("torch.")
                    line = ", ".join(f"{subject} {figure[0]:.2f}" for subject, figure in figures.items())
                    print(f"{pair} {name} {packing} B={batch}: {line}", flush=True)
                    for subject, (micros, out_error, state_error) in figures.items():
                        rows.append([pair, name, packing, batch, subject, f"{micros:.3f}", out_error, state_error])
                    del case
                    torch.cuda.empty_cache()
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            about = [datetime.date.today(), torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}"]
            writer.writerow(["# " + ", ".join(map(str, about))])
            writer.writerow(["heads", "state", "packing", "batch", "subject", "microseconds", "error of out", "error of state"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
