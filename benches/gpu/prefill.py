#!/usr/bin/env python3
"""Prefill on a GPU: the whole core in gdn against chains of the engines' kernels, and what each makes of hostile inputs, in one process.

    pip install ./python && pip install --no-deps fla-core==0.6.0
    pip install flash-qla==0.1.3 tilelang==0.1.12 flashinfer-python==0.7.2 nvidia-cutlass-dsl[cu13]
    python python/tests/peers.py sglang vllm
    python benches/gpu/prefill.py --csv OUT.csv --svg OUT.svg

A chain is SGLang's convolution, vLLM's preparation (split, l2norm, gates), a scan and SGLang's norm; the scans are those that can be loaded of FLA 0.6, SGLang 0.5.23, vLLM 0.33,
FlashQLA 0.1.3 (with the context parallelism that it chooses) and FlashInfer 0.7.2 (without its context parallelism, and with it). The engines' files are loaded from where they are, with
stand-ins for the rest of the engines. Every subject is first held to float64. Each is captured in a CUDA graph; graphs are replayed in turns, and a figure is the median over the turns,
in microseconds. `alone` are the scans on prepared q, k, v, g, beta. `--segments` has `Layer.prefill(..., segments=True)` beside it, for heads and lengths where that does something.
"""

import argparse
import contextlib
import csv
import datetime
import importlib
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python/tests"), str(ROOT / "benches")]

import oracle_layer as ol
import peers
import sglang_rig
import stand_ins
import torch
import triton
import vllm_rig
from bars import svg
from graphs import graph_of, medians

import gdn

D = 128
HEADS = {"16/32": (16, 32, D, D), "4/8": (4, 8, D, D), "16/48": (16, 48, D, D)}
RAGGED = {"4 x 2048": [2048] * 4, "100, 1, 3000, 777, 4096": [100, 1, 3000, 777, 4096]}
SCANS = "SGLang,vLLM,FLA,FlashQLA,FlashInfer,FlashInfer with context parallelism"
#: How many tokens of a sequence, from its first, are held to float64.
CHECKED = 512


class Case:
    """A layer, its projections, and states in slots: each sequence begins, its slot holds zeros."""

    def __init__(self, heads, lengths, seed=0):
        torch.manual_seed(seed)
        self.heads, self.lengths = heads, lengths
        hk, hv, dk, dv = heads
        self.channels, rows = ol.channels(heads), sum(lengths)
        made = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.qkvz, self.ba = made(rows, self.channels + hv * dv), made(rows, 2 * hv)
        self.weights = ol.Weights(
            made(self.channels, 4) * 0.3, None, torch.rand(hv, device="cuda"), torch.rand(hv, device="cuda"), 1 + 0.1 * made(dv)
        )
        n = len(lengths)
        self.conv = torch.zeros(n, self.channels, 3, device="cuda", dtype=torch.bfloat16)
        self.state = torch.zeros(n, hv, dv, dk, device="cuda")
        self.starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        self.slots = torch.arange(n, dtype=torch.int32, device="cuda")
        self.fresh = torch.zeros(n, dtype=torch.bool, device="cuda")
        self.out = torch.empty(rows, hv, dv, device="cuda", dtype=torch.bfloat16)

    def clear(self):
        self.conv.zero_(), self.state.zero_()

    def exact(self):
        """The output of the first tokens of the longest sequence in float64, and its state after them."""
        which = max(range(len(self.lengths)), key=lambda r: self.lengths[r])
        first = int(self.starts[which])
        rows = slice(first, first + min(CHECKED, self.lengths[which]))
        numbers = ol.Numbers(self.heads, "contiguous")
        tokens = ol.unpacked([self.qkvz[rows], self.ba[rows]], numbers)
        y, _, states = ol.sequence(numbers, self.weights, tokens, torch.zeros_like(self.conv[0]), torch.zeros_like(self.state[0]))
        state = states[-1] if rows.stop - first == self.lengths[which] else None
        return which, rows, y, state


# ---- subjects


def ours(case, segments=False):
    layer = gdn.Layer(case.heads, "contiguous", **vars(case.weights))

    def run():
        layer.prefill(
            (case.qkvz, case.ba), case.starts, case.conv, case.state,
            state_indices=case.slots, has_initial_state=case.fresh, segments=segments, out=case.out)
        return case.out

    return run


class Engines:
    """The kernels of the engines, by what they are in a chain."""

    def __init__(self, scans):
        kernels = "sglang.kernels.ops"
        fla = f"{kernels}.attention.fla"
        self.convolve = importlib.import_module(f"{kernels}.mamba.causal_conv1d_triton").causal_conv1d_fn
        self.norm = importlib.import_module(f"{fla}.layernorm_gated").layernorm_fn
        vllm = importlib.import_module(f"{vllm_rig.FLA}.ops")
        self.prepare = vllm.fused_post_conv_prep
        os.environ["FLA_FLASH_QLA"] = "0"  # FLA's own kernels, also where FlashQLA is there
        wanted = {
            "SGLang": lambda: self._sglang(importlib.import_module(f"{fla}.chunk").chunk_gated_delta_rule),
            "vLLM": lambda: self._vllm(vllm.chunk_gated_delta_rule, importlib.import_module(f"{vllm_rig.FLA}.ops.index")),
            "FLA": lambda: self._fla(importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule, state_v_first=True),
            "FlashQLA": lambda: self._fla(importlib.import_module("flash_qla").chunk_gated_delta_rule, state_v_first=True),
            "FlashInfer": lambda: self._flashinfer(use_cp=False),
            "FlashInfer with context parallelism": lambda: self._flashinfer(use_cp=True),
        }
        self.scans = {}
        for name in scans:
            with contextlib.suppress(ImportError):
                self.scans[name] = wanted[name]()

    @staticmethod
    def _sglang(scan):
        def run(case, q, k, v, g, beta):
            return scan(
                q, k, v, g, beta, initial_state=case.state, initial_state_indices=case.slots, cu_seqlens=case.starts,
                use_qk_l2norm_in_kernel=False)[0]

        return run

    @staticmethod
    def _vllm(scan, index):
        def run(case, q, k, v, g, beta):
            if not hasattr(case, "chunks"):
                starts = case.starts.cpu()
                case.chunks = index.prepare_chunk_indices(starts, 64).cuda(), index.prepare_chunk_offsets(starts, 64).cuda()
            o, state = scan(
                q, k, v, g, beta, initial_state=case.state, output_final_state=True, cu_seqlens=case.starts,
                chunk_indices=case.chunks[0], chunk_offsets=case.chunks[1], use_qk_l2norm_in_kernel=False)
            case.state.copy_(state)  # into its slots, as the engine does it
            return o

        return run

    @staticmethod
    def _fla(scan, **how):
        def run(case, q, k, v, g, beta):
            if not hasattr(case, "starts_64"):
                case.starts_64, case.zeros = case.starts.long(), torch.zeros_like(case.state)
            o, state = scan(
                q, k, v, g, beta, initial_state=case.zeros, output_final_state=True, cu_seqlens=case.starts_64,
                use_qk_l2norm_in_kernel=False, **how)
            case.state.copy_(state if how else state.transpose(-1, -2))
            return o

        return run

    @staticmethod
    def _flashinfer(**how):
        scan = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule

        def run(case, q, k, v, g, beta):
            o, _ = scan(
                *(one[0] for one in (q, k, v, g, beta)), initial_state=case.state, output_final_state=True, cu_seqlens=case.starts,
                output_state=case.state, state_indices=case.slots, max_seqlen=max(case.lengths), backend="flashinfer", **how)
            return o

        run.wants_exp_of_g = True
        return run

    def prepared(self, case, name):
        hk, hv, dk, dv = case.heads
        w = case.weights
        mixed = case.qkvz[:, : case.channels]
        done = self.convolve(
            mixed.transpose(0, 1), w.conv_weight, None, case.conv, case.starts, case.lengths, cache_indices=case.slots,
            has_initial_state=case.fresh, activation="silu").transpose(0, 1)
        b, a = case.ba.split([hv, hv], dim=1)
        exp = getattr(self.scans[name], "wants_exp_of_g", False)
        parts = self.prepare(done, a, b, w.A_log, w.dt_bias, hk, dk, dv, output_g_exp=exp)
        return [one.unsqueeze(0) for one in parts]

    def chain(self, case, name):
        _, hv, _, dv = case.heads
        z = case.qkvz[:, case.channels :].view(-1, hv, dv)

        def run():
            o = self.scans[name](case, *self.prepared(case, name))
            return self.norm(o.view(-1, dv), case.weights.norm_weight, None, z=z, eps=1e-6, is_rms_norm=True).view(-1, hv, dv)

        return run

    def alone(self, case, name):
        parts = self.prepared(case, name)
        return lambda: self.scans[name](case, *parts)


def error(got, right):
    got, right = got.double(), right.double()
    return ((got - right).norm() / right.norm().clamp(min=1e-300)).item()


# ---- timing


def measure(case, engines, turns, segments):
    right = case.exact()
    subjects = {"gdn": ours(case)}
    if segments and case.heads[1] * case.heads[3] <= 1024 and max(case.lengths) >= 2048:
        subjects["gdn, segments"] = ours(case, segments=True)
    subjects |= {f"chain, {name}": engines.chain(case, name) for name in engines.scans}
    results, graphs = {}, {}
    for name, run in subjects.items():
        try:
            case.clear()
            which, rows, y, state = right
            got = run()
            torch.cuda.synchronize()
            errors = [error(got[rows], y), "" if state is None else error(case.state[which], state)]
            assert max(one for one in errors if one != "") < 2e-2, f"{name} is off float64 by {errors}"
            results[name] = errors
            graphs[name] = graph_of(run, 1)
        except Exception as failed:  # a peer that does not run is said so, and the others go on
            print(f"{name}: {type(failed).__name__}: {str(failed)[:300]}", flush=True)
    for name in engines.scans:
        try:
            graphs[f"alone, {name}"] = graph_of(engines.alone(case, name), 1)
            results[f"alone, {name}"] = ["", ""]
        except Exception as failed:
            print(f"alone, {name}: {type(failed).__name__}: {str(failed)[:300]}", flush=True)
    for graph in graphs.values():
        graph.replay()
    figures = medians(graphs, turns, before=case.clear)
    return {name: (took, *results[name]) for name, took in figures.items()}


# ---- hostile inputs


def hostile(kind):
    """A case of 512 tokens of one sequence; `conv_weight` passes each input on, so that keys are what is said."""
    case = Case(HEADS["4/8"], [CHECKED], seed=1)
    hk, hv, dk, dv = case.heads
    case.weights.conv_weight.zero_()
    case.weights.conv_weight[:, 3] = 1
    keys, v = slice(hk * dk, 2 * hk * dk), slice(2 * hk * dk, case.channels)
    b, a = case.ba[:, :hv], case.ba[:, hv:]
    slow = lambda: (a.fill_(-20), b.fill_(8))
    if kind == "all keys equal":
        case.qkvz[:, keys] = case.qkvz[:1, keys]
        slow()
    elif kind == "keys alternate":
        sign = 1 - 2 * (torch.arange(CHECKED, device="cuda") % 2)[:, None]
        case.qkvz[:, keys] = (0.01 * case.qkvz[:1, keys]) * sign  # silu(x) is x / 2 there
        slow()
    elif kind == "beta near 1, no decay":
        a.fill_(-90), b.fill_(20)
    elif kind == "decay of -20 a token":
        case.weights.A_log.fill_(3.0), a.fill_(1.0), case.weights.dt_bias.zero_()
    elif kind == "decay of -1000 a token":
        case.weights.A_log.fill_(6.9), a.fill_(1.0), case.weights.dt_bias.zero_()
    elif kind == "a = 90":
        a.fill_(90)
    elif kind == "keys of zeros":
        case.qkvz[:, keys] = 0
    elif kind == "a state of 1e4":
        case.qkvz[:, v] *= 1e4
    return case


KINDS = [
    "random", "all keys equal", "keys alternate", "beta near 1, no decay", "decay of -20 a token", "decay of -1000 a token", "a = 90",
    "keys of zeros", "a state of 1e4",
]


def errors(engines):
    for kind in KINDS:
        case = hostile(kind)
        which, rows, y, state = case.exact()
        for name, run in ({"gdn": ours(case)} | {f"chain, {name}": engines.chain(case, name) for name in engines.scans}).items():
            case.clear()
            try:
                got = run()
                torch.cuda.synchronize()
            except Exception as failed:
                print(f"{kind}, {name}: {type(failed).__name__}: {str(failed)[:200]}")
                continue
            bad = int((~got.isfinite()).sum()) + int((~case.state.isfinite()).sum())
            yield kind, name, error(got[rows], y), error(case.state[which], state), bad


# ---- the first result


def first_result():
    """In a new process: seconds from a context with tensors in it to the first result."""
    case = Case(HEADS["16/32"], [64])
    torch.cuda.synchronize()
    start = time.perf_counter()
    ours(case)()
    torch.cuda.synchronize()
    print("first", time.perf_counter() - start)


def first_results(processes):
    """Milliseconds, each in a process of its own, with nothing kept of kernels that the driver compiled before."""
    took = []
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, *(["-P"] if sys.flags.safe_path else []), __file__, "--first-result"]
            done = subprocess.run(command, env=os.environ | {"CUDA_CACHE_PATH": cache}, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("first ")]
        took += [float(line.split()[1]) * 1000 for line in lines]
        if not lines:
            print(f"first result: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}")
    return took


# ---- what comes out


def bars(rows):
    """For each shape the time of gdn's whole core and of the fastest chain."""
    groups = {}
    for heads, shape, subject, micros, *_ in rows:
        if subject == "gdn" or subject.startswith("chain"):
            groups.setdefault(f"{heads}, {shape}", {})[subject] = float(micros)
    for label, figures in groups.items():
        chains = sorted((name for name in figures if name != "gdn"), key=figures.get)
        groups[label] = {name: figures[name] for name in ("gdn", *chains[:1]) if name in figures}
    return groups


def write(arguments, rows, hostile_rows, about):
    """What there is so far: a run that is ended early has left its figures."""
    if arguments.csv:
        with open(arguments.csv, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f"# {about}"])
            writer.writerow(["heads", "tokens", "subject", "microseconds", "error of out", "error of state"])
            writer.writerows(rows)
            writer.writerow(["# hostile inputs, 4/8 heads, 512 tokens"])
            writer.writerow(["input", "", "subject", "not finite", "error of out", "error of state"])
            writer.writerows([[kind, "", name, bad, out, state] for kind, name, out, state, bad in hostile_rows])
    if arguments.svg:
        title = "Prefill of one layer, projections in, normed heads out: gdn, and the fastest chain"
        Path(arguments.svg).write_text(svg(title, f"{about}; heads of 128, bf16, states f32", bars(rows)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="where figures go")
    parser.add_argument("--svg", help="where bars go")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--heads", default=",".join(HEADS))
    parser.add_argument("--tokens", default="512,2048,8192,32768,ragged")
    parser.add_argument("--scans", default=SCANS, help="which, of those that can be loaded")
    parser.add_argument("--segments", action="store_true", help="gdn with segments=True too")
    parser.add_argument("--no-errors", action="store_true", help="without hostile inputs")
    parser.add_argument("--first", type=int, default=3, help="processes for the time to the first result")
    parser.add_argument("--first-result", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_result:
        return first_result()
    torch.set_grad_enabled(False)
    about = [str(datetime.date.today()), torch.cuda.get_device_name(), f"torch {torch.__version__}", f"triton {triton.__version__}"]
    for package in ("fla-core", "flash-qla", "tilelang", "flashinfer-python", "nvidia-cutlass-dsl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about.append(f"{package} {importlib.metadata.version(package)}")
    rows, hostile_rows = [], []
    with contextlib.ExitStack() as stack:
        for package, rig in (("sglang", sglang_rig), ("vllm", vllm_rig)):
            stack.enter_context(stand_ins.engine(peers.folder(package), package, rig.REAL, rig.given()))
        engines = Engines(arguments.scans.split(","))
        print("scans:", ", ".join(engines.scans), flush=True)
        for heads in arguments.heads.split(","):
            for shape in arguments.tokens.split(","):
                for name, lengths in RAGGED.items() if shape == "ragged" else [(f"T = {shape}", [int(shape)])]:
                    case = Case(HEADS[heads], lengths)
                    figures = measure(case, engines, arguments.turns, arguments.segments)
                    print(f"{heads} {name}: " + ", ".join(f"{one} {figure[0]:.1f}" for one, figure in figures.items()), flush=True)
                    rows += [[heads, name, one, f"{t:.2f}", out, state] for one, (t, out, state) in figures.items()]
                    write(arguments, rows, hostile_rows, ", ".join(about))
                    del case
                    torch.cuda.empty_cache()
        for line in () if arguments.no_errors else errors(engines):
            kind, name, out, state, bad = line
            hostile_rows.append([kind, name, out, state, bad])
            print(f"{kind}: {name}: out {out:.1e}, state {state:.1e}, {bad} not finite", flush=True)
    if took := first_results(arguments.first):
        print("first result of gdn in a new process, ms:", ", ".join(f"{one:.1f}" for one in took))
        rows.append(["16/32", "T = 64, a new process", "gdn, first result", f"{statistics.median(took) * 1000:.0f}", "", ""])
    write(arguments, rows, hostile_rows, ", ".join(about))


if __name__ == "__main__":
    main()
