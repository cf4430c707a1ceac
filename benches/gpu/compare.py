#!/usr/bin/env python3
"""The split on a GPU against copies of the same bytes and against what others run, in one process.

    cargo build --release -p gdn --features cuda --example gdn_shim
    python3 benches/gpu/compare.py --peer sglang=PATH --peer seed=PATH --csv OUT.csv --svg OUT.svg

Every subject is first held bit for bit to the definition, then captured in a CUDA graph. Graphs are replayed in turns, and a figure
is the median over the turns. Needs torch and Triton. A peer is an installed package or a file, given as NAME=PATH; one that is not
there is printed as missing, one that does not compile or gives other bits as failing, and the others go on.
"""

import argparse
import csv
import ctypes
import datetime
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benches"))

from copies import copy_in_pieces, triton_copy
from graphs import bits, graph_of
from peers import load

SHIM = ROOT / "target/release/examples/libgdn_shim.so"
POISON = 0xA5


class Heads:
    def __init__(self, hk, hv, dk, dv):
        self.hk, self.hv, self.dk, self.dv, self.r = hk, hv, dk, dv, hv // hk
        self.qkvz, self.ba = 2 * hk * dk + 2 * hv * dv, 2 * hv
        self.qkv, self.z = 2 * hk * dk + hv * dv, hv * dv

    def __str__(self):
        dims = f"{self.dk}" if self.dk == self.dv else f"{self.dk}+{self.dv}"
        return f"{self.hk}/{self.hv}x{dims}"


def eager_split(h, qkvz, ba):
    """Views, split and cat: the definition, and what a model does without a fused kernel."""
    n, rdv = qkvz.shape[0], h.r * h.dv
    q, k, v, z = qkvz.view(n, h.hk, -1).split([h.dk, h.dk, rdv, rdv], dim=2)
    b, a = ba.view(n, h.hk, -1).split([h.r, h.r], dim=2)
    mixed = torch.cat([x.reshape(n, -1) for x in (q, k, v)], dim=1)
    return mixed, z.reshape(n, h.hv, h.dv), b.reshape(n, h.hv), a.reshape(n, h.hv)


# ---- this library


class Call(ctypes.Structure):
    _fields_ = [
        ("heads", ctypes.c_uint64 * 4),
        ("contiguous", ctypes.c_uint32),
        ("merge", ctypes.c_uint32),
        ("num_rows", ctypes.c_uint64),
        ("element_sizes", ctypes.c_uint64 * 2),
        ("addresses", ctypes.c_uint64 * 6),
    ]


class Gdn:
    def __init__(self, path):
        self.run = ctypes.CDLL(str(path)).gdn_run
        self.run.restype = ctypes.c_double
        self.run.argtypes = [
            ctypes.POINTER(Call), ctypes.c_uint64, ctypes.c_bool, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_size_t,
        ]

    def prepare(self, h, qkvz, ba, out, merge=False):
        tensors = [qkvz, ba, *out]
        return Call(
            (ctypes.c_uint64 * 4)(h.hk, h.hv, h.dk, h.dv), 0, int(merge), qkvz.shape[0],
            (ctypes.c_uint64 * 2)(qkvz.element_size(), ba.element_size()),
            (ctypes.c_uint64 * 6)(*[t.data_ptr() for t in tensors]),
        )

    def __call__(self, call, programmatic=True, calls=1):
        message = ctypes.create_string_buffer(500)
        stream = torch.cuda.current_stream().cuda_stream
        took = self.run(ctypes.byref(call), stream, programmatic, calls, message, 500)
        if took < 0:
            raise RuntimeError(message.value.decode())
        return took


# ---- peers


INSTALLED = {"sglang": "sglang.kernels.ops.attention.triton_gdn_fused_proj"}


def load_peer(name, path):
    if path is None:
        module = INSTALLED.get(name)
        if module is None:
            raise ImportError("not given")
        return importlib.import_module(module)
    return load(path)


def peers(given):
    """Name to a function of (heads, qkvz, ba)."""
    found, multiprocessors = {}, torch.cuda.get_device_properties(0).multi_processor_count
    for name in ("sglang", "seed"):
        try:
            module = load_peer(name, given.get(name))
        except Exception as error:
            print(f"missing: {name}: {error}")
            continue
        split = module.fused_qkvzba_split_reshape_cat
        call = lambda h, qkvz, ba, split=split: split(qkvz, ba, h.hk, h.hv, h.dk, h.dv)
        if name != "seed":
            found[name] = call
            continue
        for programs in (1, 8):
            def seed(h, qkvz, ba, module=module, call=call, cores=programs * multiprocessors):
                module.get_vectorcore_num = lambda: cores
                return call(h, qkvz, ba)
            found[f"seed, {programs} a multiprocessor"] = seed
    return found


# ---- measuring


def quick_estimate(run):
    run()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(3):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / 3


def measure(subjects, rounds, slow):
    """Microseconds of one call of each subject: median, tenth and ninetieth percentile. Those in `slow` take part in fewer rounds."""
    graphs = {}
    for name, run in subjects.items():
        calls = max(2, min(200, int(400 / max(quick_estimate(run), 1.0))))
        graphs[name] = (graph_of(run, calls), calls)
    times = {name: [] for name in subjects}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for turn in range(rounds + 2):
        for name, (graph, calls) in graphs.items():
            if name in slow and turn >= 7:
                continue
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) * 1000 / calls)
    cut = lambda t, q: sorted(t)[min(len(t) - 1, int(q * len(t)))]
    return {name: (statistics.median(t), cut(t, 0.1), cut(t, 0.9)) for name, t in times.items()}


def random_bits(n, features, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (n, features * size), dtype=torch.uint8, device="cuda").view(dtype)


def case(h, n, dtype, ba_dtype, gdn, found, rounds, failed, skip):
    qkvz, ba = random_bits(n, h.qkvz, dtype), random_bits(n, h.ba, ba_dtype)
    wanted = [bits(t).clone() for t in eager_split(h, qkvz, ba)]
    new = lambda features, like: torch.empty(n, features, dtype=like.dtype, device="cuda")
    out = [new(h.qkv, qkvz), new(h.z, qkvz), new(h.hv, ba), new(h.hv, ba)]
    call = gdn.prepare(h, qkvz, ba, out)
    total = qkvz.numel() * qkvz.element_size() + ba.numel() * ba.element_size()
    src, dst = (torch.randint(0, 256, (total,), dtype=torch.uint8, device="cuda") for _ in range(2))

    subjects = {"gdn": lambda: (gdn(call), out)[1], "gdn, ordinary launch": lambda: (gdn(call, False), out)[1]}
    subjects |= {name: lambda run=run: run(h, qkvz, ba) for name, run in found.items() if (name, str(h)) not in skip}
    subjects["torch eager"] = lambda: eager_split(h, qkvz, ba)
    right = {}
    for name, run in subjects.items():
        try:
            for t in out:
                bits(t).fill_(POISON)
            got = run()
            torch.cuda.synchronize()
            if any(not torch.equal(bits(g), w) for g, w in zip(got, wanted)):
                raise RuntimeError("other bits than the definition's")
            del got
            right[name] = run
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]
            print(f"failing: {name}: {h}, {dtype}: {reason}")
            failed.append((name, str(h), reason))
            skip.add((name, str(h)))
    back, back_ba = torch.empty_like(qkvz), torch.empty_like(ba)
    bits(back).fill_(POISON), bits(back_ba).fill_(POISON)
    for t, w in zip(out, wanted):
        bits(t).copy_(w)
    merge = gdn.prepare(h, back, back_ba, out, merge=True)
    gdn(merge)
    if not (torch.equal(bits(back), bits(qkvz)) and torch.equal(bits(back_ba), bits(ba))):
        sys.exit(f"gdn's merge gives other bits: {h}, N = {n}")
    if "gdn" not in right or "gdn, ordinary launch" not in right:
        sys.exit("gdn gives other bits")
    right["gdn merge"] = lambda: gdn(merge)
    right |= {"torch copy": lambda: dst.copy_(src), "copy kernel (Triton)": lambda: triton_copy(src, dst)}
    if total > 512 << 20:
        right["torch copy, 512 MiB at a time"] = lambda: copy_in_pieces(src, dst)
    slow = {name for name in right if name.startswith(("seed", "torch eager"))}
    return total, measure(right, rounds, slow)


COPIES = ("torch copy", "copy kernel (Triton)", "torch copy, 512 MiB at a time")


def first_result(subject, args):
    """In a new process: seconds from a context with tensors in it to the first result."""
    h = Heads(16, 32, 128, 128)
    qkvz, ba = random_bits(4, h.qkvz, torch.bfloat16), random_bits(4, h.ba, torch.bfloat16)
    torch.cuda.synchronize()
    run = None
    start = time.perf_counter()
    if subject == "gdn":
        out = [torch.empty(4, f, dtype=torch.bfloat16, device="cuda") for f in (h.qkv, h.z, h.hv, h.hv)]
        gdn = Gdn(args.library)
        gdn(gdn.prepare(h, qkvz, ba, out))
    else:
        run = peers(args.peer)[subject]
        start = time.perf_counter()
        run(h, qkvz, ba)
    torch.cuda.synchronize()
    print("first", time.perf_counter() - start)


def first_results(names, args):
    print("\ntime to the first result in a new process, ms (median of 3, empty caches)")
    rows = []
    for name in names:
        took = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as cache:
                env = os.environ | {"TRITON_CACHE_DIR": f"{cache}/triton", "CUDA_CACHE_PATH": f"{cache}/cuda"}
                command = [sys.executable, __file__, "--library", str(args.library), "--first", name]
                command += [f"--peer={k}={v}" for k, v in args.peer.items()]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("first ")]
            if lines:
                took.append(float(lines[0].split()[1]) * 1000)
        if took:
            rows.append((name, statistics.median(took)))
            print(f"  {name:28} {rows[-1][1]:9.2f}")
        else:
            print(f"  {name:28}   failing: {(done.stderr.strip().splitlines() or ['?'])[-1][:120]}")
    return rows


def host_latency(gdn, found):
    """Microseconds of the host for one eager call with one token."""
    h = Heads(16, 32, 128, 128)
    qkvz, ba = random_bits(1, h.qkvz, torch.bfloat16), random_bits(1, h.ba, torch.bfloat16)
    out = [torch.empty(1, f, dtype=torch.bfloat16, device="cuda") for f in (h.qkv, h.z, h.hv, h.hv)]
    call = gdn.prepare(h, qkvz, ba, out)

    def with_outputs():
        out = [torch.empty(1, f, dtype=torch.bfloat16, device="cuda") for f in (h.qkv, h.z, h.hv, h.hv)]
        gdn(gdn.prepare(h, qkvz, ba, out))

    subjects = {"gdn, from Python": with_outputs, "torch eager": lambda: eager_split(h, qkvz, ba)}
    subjects |= {name: lambda run=run: run(h, qkvz, ba) for name, run in found.items()}
    rows = []
    for on, what in ((True, "gdn, the raw launch"), (False, "gdn, the raw launch, ordinary")):
        took = []
        for _ in range(50):
            took.append(gdn(call, on, 200) / 1000)
            torch.cuda.synchronize()
        rows.append((what, statistics.median(took)))
    for name, run in subjects.items():
        took = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                run()
            took.append((time.perf_counter() - start) * 1e6 / 50)
        rows.append((name, statistics.median(took)))
    torch.cuda.synchronize()
    print("\nhost time of an eager call, us (median)")
    for name, took in rows:
        print(f"  {name:32} {took:8.2f}")
    return rows


def behind_another_kernel(gdn, rounds):
    """Microseconds that a split, or a copy, adds behind a kernel that knows nothing of programmatic dependent launch."""
    h, rows = Heads(16, 32, 128, 128), []
    print("\nadded behind an elementwise kernel of torch, us (median)")
    for n in (1, 64, 1024):
        qkvz, ba = random_bits(n, h.qkvz, torch.bfloat16), random_bits(n, h.ba, torch.bfloat16)
        out = [torch.empty(n, f, dtype=torch.bfloat16, device="cuda") for f in (h.qkv, h.z, h.hv, h.hv)]
        call, x, dst = gdn.prepare(h, qkvz, ba, out), torch.zeros(1 << 14, device="cuda"), torch.empty_like(qkvz)
        times = measure({
            "nothing": lambda: x.add_(1),
            "gdn": lambda: (x.add_(1), gdn(call)),
            "gdn, ordinary launch": lambda: (x.add_(1), gdn(call, False)),
            "torch copy": lambda: (x.add_(1), dst.copy_(qkvz)),
        }, rounds, ())
        for name in list(times)[1:]:
            rows.append((f"{name}, N = {n}", times[name][0] - times["nothing"][0]))
            print(f"  {rows[-1][0]:32} {rows[-1][1]:8.3f}")
    return rows


SUITES = {
    # heads, dtype of qkvz, of ba, the Ns
    "bounds": [
        (heads, "bfloat16", "bfloat16", [1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768, 131072])
        for heads in ((16, 32, 128, 128), (4, 8, 128, 128))
    ],
    "others": [
        (heads, dtype, dtype, [1, 64, 1024, 8192, 32768])
        for heads, dtype in (
            ((16, 48, 128, 128), "bfloat16"),
            ((8, 40, 128, 128), "bfloat16"),
            ((4, 32, 128, 128), "bfloat16"),
            ((16, 32, 96, 96), "bfloat16"),
            ((16, 32, 128, 128), "float32"),
        )
    ],
}


def plot(path, rows, gpu):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gdn"
    from matplotlib import pyplot

    cases = list(dict.fromkeys((r["heads"], r["dtype"]) for r in rows if r.get("N")))[:2]
    figure, axes = pyplot.subplots(1, len(cases), figsize=(6.2 * len(cases), 4.4), sharey=True, squeeze=False)
    for axis, (heads, dtype) in zip(axes[0], cases):
        here = [r for r in rows if (r["heads"], r["dtype"]) == (heads, dtype) and r.get("N")]
        for name in dict.fromkeys(r["subject"] for r in here):
            if name in COPIES[1:] or name == "gdn merge":
                continue
            line = [(int(r["N"]), float(r["ratio_to_best_copy"])) for r in here if r["subject"] == name]
            axis.plot(*zip(*sorted(line)), marker="o", markersize=3, label=name, linewidth=2 if name == "gdn" else 1)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="N", title=f"{heads}, {dtype}")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time / best copy of the same bytes")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(gpu)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=SHIM, help="libgdn_shim.so")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="sglang=FILE, seed=FILE")
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--most", type=int, default=1 << 30, help="leave out larger N")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--plot", type=Path, metavar="CSV", help="only draw --svg from a record")
    parser.add_argument("--first", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.peer = dict(peer.split("=", 1) for peer in args.peer)
    if args.plot:
        rows = list(csv.DictReader(line for line in args.plot.open() if not line.startswith("#")))
        return plot(args.svg, rows, rows[0]["gpu"])
    if args.first:
        return first_result(args.first, args)

    gpu = torch.cuda.get_device_name(0)
    print(f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today()}")
    gdn, found, failed, skip, rows = Gdn(args.library), peers(args.peer), [], set(), []
    for suite in args.suite or SUITES:
        for numbers, dtype, ba_dtype, ns in SUITES[suite]:
            h = Heads(*numbers)
            for n in (n for n in ns if n <= args.most):
                torch.cuda.empty_cache()
                total, times = case(
                    h, n, getattr(torch, dtype), getattr(torch, ba_dtype), gdn, found, args.rounds, failed, skip
                )
                best = min(times[name][0] for name in COPIES if name in times)
                print(f"\n{h} {dtype} N = {n}: best copy {best:.2f} us, {2 * total / best / 1e6:.2f} TB/s")
                for name, (median, low, high) in times.items():
                    print(f"  {name:32} {median:10.3f} us  {median / best:7.3f} of the best copy  [{low:.2f}, {high:.2f}]")
                    rows.append({
                        "gpu": gpu, "heads": str(h), "dtype": dtype, "N": n, "subject": name, "us": f"{median:.4f}",
                        "us_p10": f"{low:.4f}", "us_p90": f"{high:.4f}", "ratio_to_best_copy": f"{median / best:.4f}",
                        "ratio_to_torch_copy": f"{median / times['torch copy'][0]:.4f}",
                        "tb_per_s": f"{2 * total / median / 1e6:.4f}",
                    })
                sys.stdout.flush()
    base = {"gpu": gpu, "heads": "16/32x128", "dtype": "bfloat16"}
    rows += [base | {"subject": f"host time: {n}", "us": f"{t:.3f}"} for n, t in host_latency(gdn, found)]
    rows += [base | {"subject": f"behind another kernel: {n}", "us": f"{t:.3f}"} for n, t in behind_another_kernel(gdn, args.rounds)]
    rows += [
        base | {"subject": f"first result: {n}", "us": f"{t * 1000:.1f}"}
        for n, t in first_results(["gdn", *(n for n in found if "8 a" not in n)], args)
    ]
    if args.csv:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            file.write(f"# {gpu}, torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}\n")
            for name, heads, reason in failed:
                file.write(f"# failing: {name}, {heads}: {reason}\n")
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if args.svg:
        plot(args.svg, rows, gpu)


if __name__ == "__main__":
    main()
