"""The engines' own source, for the tests of the integrations: fetched once with pip, read from a folder.

    python python/tests/peers.py [sglang] [vllm] [vllm_ascend]

Into $GDN_PEERS, by default the folder peers/ of the repository.

SGLang and vLLM cannot be installed beside a torch of one's own choice, so their wheels are downloaded (40,
340 and 26 MB, with the hashes pinned here), their Python files are unpacked and the wheels are deleted.
Nothing of them is in this repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(os.environ.get("GDN_PEERS") or Path(__file__).parents[2] / "peers")
WHEELS = {  # package: (release, Python, platform, SHA-256 of the wheel)
    "sglang": (
        "0.5.23",
        "3.11",
        "manylinux_2_34_x86_64",
        "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937",
    ),
    "vllm": (
        "0.33.0",
        "3.11",
        "manylinux_2_28_x86_64",
        "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa",
    ),
    "vllm_ascend": (
        "0.23.0",
        "3.11",
        "manylinux_2_34_x86_64",
        "4f0d25d3b6d8ae85753b53d4bd8d910418865baf413fa779b87012ad1a4a3f87",
    ),
}


def folder(package: str) -> Path:
    """Where the files of the pinned release lie, or are to lie: a folder that can go on `sys.path`."""
    return FOLDER / f"{package}-{WHEELS[package][0]}"


def fetch(package: str) -> None:
    """Downloads the pinned wheel, checks its hash, unpacks its Python files and metadata; once."""
    if folder(package).is_dir():
        return
    release, python, platform, sha256 = WHEELS[package]
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as made:
        wanted = Path(made) / "wanted.txt"
        wanted.write_text(f"{package}=={release} --hash=sha256:{sha256}\n")
        which = ["--only-binary=:all:", "--python-version", python, "--platform", platform]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-cache-dir",
            "--require-hashes",
        ]
        subprocess.run([*pip, *which, "--dest", made, "--requirement", str(wanted)], check=True)
        (wheel,) = Path(made).glob("*.whl")
        unpacked = Path(made) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
            archive.extractall(unpacked, names)
        unpacked.rename(folder(package))  # whole, or not there


if __name__ == "__main__":
    for name in sys.argv[1:] or WHEELS:
        fetch(name)
        print(folder(name))
