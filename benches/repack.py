"""Measures `gdn repack` against `cp` on a synthetic checkpoint of 4 GB, alternating on the same disk.

    python benches/repack.py GDN FOLDER [ROUNDS] > benches/record/MACHINE/repack-DATE.csv

GDN is the built command, FOLDER a place with 13 GB to spare; what is made there is removed in the end. The checkpoint has
the 36 Gated DeltaNet layers of Qwen3-Next-80B-A3B, with their projections (45 % of the bytes, which move) and as many
bytes again of tensors that stay, in shards of six layers. Both sides read it from the page cache.

`gdn repack` has its files on the disk when it returns, `cp` does not: `cp+sync` is the same work, `cp` alone is given
besides. Every result of `gdn repack` is proved by `gdn verify` before its time counts.
"""

import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

CONFIG = {
    "model_type": "qwen3_next",
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
HIDDEN = 2048
LAYER = [("linear_attn.in_proj_ba", 64), ("linear_attn.in_proj_qkvz", 12288), ("linear_attn.out_proj", 4096)] + [
    (f"mlp.experts.{i}.{name}", 512) for i in range(7) for name in ("down_proj", "gate_proj", "up_proj")
]


def make(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    noise = os.urandom((16 << 20) + 4099)
    weight_map, total = {}, 0
    for shard in range(6):
        file = f"model-{shard + 1:05}-of-00006.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for layer in range(6 * shard, 6 * shard + 6):
            for name, rows in LAYER:
                start, end = end, end + rows * HIDDEN * 2
                name = f"model.layers.{layer}.{name}.weight"
                header[name] = {"dtype": "BF16", "shape": [rows, HIDDEN], "data_offsets": [start, end]}
                weight_map[name] = file
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for at in range(0, end, 16 << 20):
                shift = at // (16 << 20) % 4099
                out.write(noise[shift : shift + min(16 << 20, end - at)])
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main(gdn, folder, rounds):
    work = Path(folder) / "gdn-bench-repack"
    source, out = work / "source", work / "out"
    commands = {
        "cp": f"cp -r {source} {out}",
        "cp+sync": f"cp -r {source} {out} && sync -f {out}",
        "gdn repack": f"{gdn} repack {source} -o {out}",
    }
    seconds = {name: [] for name in commands}
    try:
        total = make(source)
        for number in range(rounds):
            # Each goes first in its turn.
            order = list(commands)[number % 3 :] + list(commands)[: number % 3]
            for name in order:
                shutil.rmtree(out, ignore_errors=True)
                subprocess.run(f"sync && cat {source}/* > /dev/null", shell=True, check=True)
                start = time.perf_counter()
                subprocess.run(commands[name], shell=True, check=True)
                seconds[name].append(time.perf_counter() - start)
                if name == "gdn repack":
                    verify = [gdn, "verify", out, "--against", source]
                    subprocess.run(verify, check=True, stdout=subprocess.DEVNULL)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    ours = statistics.median(seconds["gdn repack"])
    print("machine,command,bytes,rounds,median_s,min_s,max_s,GB_per_s,speed_of_gdn_repack_over_it")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f'"{cpu}, {os.cpu_count()} CPUs",{name},{total},{rounds},{median:.2f},{min(times):.2f},{max(times):.2f},'
            f"{total / median / 1e9:.3f},{median / ours:.2f}"
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 3)
