"""The Triton kernel on an NVIDIA GPU: bit for bit, then side by side with the seed's at as many programs.

    python3 benches/triton/compare.py --seed PATH --csv OUT.csv [--sweep]

PATH is vllm-ascend's vllm_ascend/ops/triton/fla/fused_qkvzba_split_reshape.py. Needs the Python package,
torch and Triton. Every subject is first held bit for bit to the definition; then it is captured in a CUDA
graph, graphs are replayed in turns, and a figure is the median over the turns. `--sweep` also tries warps,
stages and programs of this library's kernel, to choose its defaults by.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from gdn import triton_check, triton_split
from gdn.triton_check import POISON, Case

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from graphs import bits, graph_of
from peers import load

TOKENS = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 32768, 131072)
HEADS = ((16, 32, 128, 128), (4, 8, 128, 128))


def tensors_of(heads, tokens):
    """`mixed_qkvz` and `mixed_ba` of random bits, poisoned outputs, and what they must become."""
    hk, hv, dk, dv = heads
    r = hv // hk
    case = Case(heads, "interleaved", tokens)
    word = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    six = [word(tokens, *tail) for tail in case.tails()]
    for t in six[:2]:
        bits(t).random_(0, 256)
    for t in six[2:]:
        bits(t).fill_(POISON)
    qkvz, ba = (t.view(torch.int16).view(tokens, hk, t.shape[1] // hk) for t in six[:2])
    q, k, v, z = qkvz.split([dk, dk, r * dv, r * dv], dim=2)
    b, a = ba.split([r, r], dim=2)
    wanted = [torch.cat([x.reshape(tokens, -1) for x in (q, k, v)], 1), z, b, a]
    return six[:2], six[2:], [bits(w) for w in wanted]


def replay(graph, start, end):
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def measure(subjects, rounds):
    """Microseconds of a call of each subject: the median over rounds, replayed in turns."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graphs, times = {}, {name: [] for name in subjects}
    for name, run in subjects.items():
        once = graph_of(run, 1)
        replay(once, start, end)
        calls = max(1, min(100, int(300 / max(replay(once, start, end), 1.0))))
        graphs[name] = (graph_of(run, calls), calls)
    for turn in range(rounds + 1):
        for name, (graph, calls) in graphs.items():
            took = replay(graph, start, end) / calls
            if turn:
                times[name].append(took)
    return {name: statistics.median(t) for name, t in times.items()}


FAILING: set[str] = set()


def right(name, run, out, wanted):
    """Whether `run` gives what it must; if not, it is printed why, once."""
    for t in out:
        bits(t).fill_(POISON)
    try:
        got = run()
        torch.cuda.synchronize()
        if all(torch.equal(bits(g), w) for g, w in zip(got, wanted)):
            return True
        reason = "other bits than the definition's"
    except Exception as error:  # noqa: BLE001 - whatever a compiler may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:120]
    if reason not in FAILING:
        print(f"failing: {name}: {reason}")
    FAILING.add(reason)
    return False


def side_by_side(seed, heads, tokens, profile, rounds):
    """Microseconds of this library's kernel, the seed's and a copy, at one size."""
    (qkvz, ba), out, wanted = tensors_of(heads, tokens)
    subjects = {"gdn": lambda: triton_split.split(qkvz, ba, *heads, "interleaved", out, profile=profile)}
    if seed:
        seed.get_vectorcore_num = lambda: profile.cores
        subjects["seed"] = lambda: seed.fused_qkvzba_split_reshape_cat(qkvz, ba, *heads)
    subjects = {name: run for name, run in subjects.items() if right(name, run, out, wanted)}
    if "gdn" not in subjects:
        sys.exit("gdn is wrong")
    size = qkvz.numel() + ba.numel()
    source, target = (torch.empty(size, dtype=qkvz.dtype, device="cuda") for _ in range(2))
    return measure(subjects | {"copy": lambda: target.copy_(source)}, rounds)


def versus_seed(seed, profile, multiprocessors, rounds, rows):
    """Both kernels at the same number of programs, and a copy."""
    slower = []
    for heads, per in itertools.product(HEADS, (1, 8)):
        cores = per * multiprocessors
        print(f"\n{heads[0]}/{heads[1]}x{heads[2]} bf16, {cores} programs, us: median of {rounds}")
        print(f"{'tokens':>8} {'gdn':>9} {'seed':>9} {'seed/gdn':>9} {'copy':>9} {'gdn/copy':>9}")
        for tokens in TOKENS:
            took = side_by_side(seed, heads, tokens, profile._replace(cores=cores), rounds)
            gdn, other, copy = took["gdn"], took.get("seed", float("nan")), took["copy"]
            ratios = other / gdn, gdn / copy
            line = f"{tokens:8} {gdn:9.2f} {other:9.2f} {ratios[0]:9.2f} {copy:9.2f} {ratios[1]:9.2f}"
            print(line, flush=True)
            rows += [("versus", *heads, cores, tokens, name, us) for name, us in took.items()]
            if other <= gdn:
                slower.append((heads, cores, tokens))
    print("\nfaster than the seed's at every size" if seed and not slower else f"\nnot faster: {slower}")


SWEEP = (1, 64, 1024, 8192, 65536)


def sweep(profile, multiprocessors, rounds, rows):
    """Warps, stages and programs of this library's kernel."""

    def at(heads, tokens, profiles):
        (qkvz, ba), out, _ = tensors_of(heads, tokens)
        split = functools.partial(triton_split.split, qkvz, ba, *heads, "interleaved", out)
        return measure({c: functools.partial(split, profile=p) for c, p in profiles.items()}, rounds)

    for heads in HEADS:
        print(f"\nsweep, {heads[0]}/{heads[1]}x{heads[2]}: us at tokens {' '.join(str(n) for n in SWEEP)}")
        took = {}
        for tokens in SWEEP:
            profiles = {
                (per, warps, stages): profile._replace(
                    cores=per * multiprocessors, num_warps=warps, num_stages=stages
                )
                for per, warps, stages in itertools.product((1, 2, 4, 8), (4, 8, 16), (1, 2, 3))
            }
            for (per, warps, stages), us in at(heads, tokens, profiles).items():
                took.setdefault((per, warps, stages), []).append(us)
                subject = f"{warps} warps, {stages} stages"
                rows.append(("sweep", *heads, per * multiprocessors, tokens, subject, us))
        for config, line in took.items():
            print(
                "  a multiprocessor, warps, stages:",
                config,
                " ".join(f"{us:9.2f}" for us in line),
                flush=True,
            )


def host_time(profile):
    """Microseconds of the host for one eager call at one token, outputs given."""
    (qkvz, ba), out, _ = tensors_of(HEADS[0], 1)
    took = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            triton_split.split(qkvz, ba, *HEADS[0], "interleaved", out, profile=profile)
        took.append((time.perf_counter() - start) * 1e6 / 50)
    return statistics.median(took)


def there_and_back(heads, tokens, profile) -> None:
    """Splits and merges, and ends the program where a bit is wrong."""
    (qkvz, ba), out, wanted = tensors_of(heads, tokens)
    if not right(
        "gdn", lambda: triton_split.split(qkvz, ba, *heads, "interleaved", out, profile=profile), out, wanted
    ):
        sys.exit(f"gdn is wrong: {tokens} tokens")
    back = [torch.empty_like(qkvz), torch.empty_like(ba)]
    merge = lambda: triton_split.merge(*out, *heads, "interleaved", back, profile=profile)
    if not right("gdn merge", merge, back, [bits(qkvz), bits(ba)]):
        sys.exit(f"gdn's merge is wrong: {tokens} tokens")


def compiled_programs() -> int:
    """Programs in the kernel's cache."""
    return sum(len(entry[0]) for entry in triton_split.split_kernel.device_caches.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", help="the file with the seed's kernel")
    parser.add_argument("--csv", help="where to write the figures")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    started = time.perf_counter()
    device = torch.cuda.get_device_properties(0)
    profile = triton_split.profile_of("cuda", 0)
    print(f"{device.name}, torch {torch.__version__}, {profile}")

    cases = triton_check.check("cuda:0", profile)
    for tokens in (1, 2, 3, 16, 17, 1000, 4096, 70_001):
        there_and_back(HEADS[1], tokens, profile)
    before = compiled_programs()
    for tokens in (1, 2, 3, 16, 17, 1000, 4096, 70_001):
        there_and_back(HEADS[1], tokens, profile._replace(num_warps=8))  # not yet compiled
    compiled = compiled_programs() - before
    there_and_back(HEADS[0], 180_000, profile)  # 2.2e9 elements of mixed_qkvz, side by side
    took = time.perf_counter() - started
    print(f"{cases} cases there and back, and 180,000 tokens: bit for bit ({took:.0f} s)")
    print(f"eight numbers of tokens, split and merged: {compiled} programs compiled, 2 are right")
    if compiled != 2:
        sys.exit("the number of tokens made it compile again")
    print(f"host time of an eager call: {host_time(profile):.1f} us")

    seed = load(args.seed) if args.seed else None
    rows: list[tuple] = []
    versus_seed(seed, profile, device.multi_processor_count, args.rounds, rows)
    if args.sweep:
        sweep(profile, device.multi_processor_count, max(5, args.rounds // 2), rows)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            out = csv.writer(file)
            out.writerow(
                (
                    "what",
                    "num_k_heads",
                    "num_v_heads",
                    "head_k_dim",
                    "head_v_dim",
                    "programs",
                    "tokens",
                    "subject",
                    "us",
                )
            )
            out.writerows((*row[:-1], f"{row[-1]:.3f}") for row in rows)
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
