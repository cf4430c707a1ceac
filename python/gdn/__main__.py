"""``python -m gdn``: what is installed, what it runs on, and whether it works here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from typing import Any

import gdn
from gdn import _gdn

#: R = 3, and dims that are no power of two.
HEADS = gdn.Heads(2, 6, 5, 7)


def expected(row: int, packing: str) -> list[list[int]]:
    """Where each feature comes from, worked out number by number: rows of ``mixed_qkv``, ``z``, ``b`` and ``a``."""
    hk, hv, dk, dv = HEADS
    r = hv // hk
    if packing == "interleaved":
        width = 2 * dk + 2 * r * dv
        q = [h * width + i for h in range(hk) for i in range(dk)]
        k = [h * width + dk + i for h in range(hk) for i in range(dk)]
        v = [h * width + 2 * dk + i for h in range(hk) for i in range(r * dv)]
        z = [h * width + 2 * dk + r * dv + i for h in range(hk) for i in range(r * dv)]
        b = [h * 2 * r + i for h in range(hk) for i in range(r)]
        a = [h * 2 * r + r + i for h in range(hk) for i in range(r)]
    else:
        q, k = list(range(hk * dk)), list(range(hk * dk, 2 * hk * dk))
        v = list(range(2 * hk * dk, 2 * hk * dk + hv * dv))
        z = list(range(2 * hk * dk + hv * dv, 2 * hk * dk + 2 * hv * dv))
        b, a = list(range(hv)), list(range(hv, 2 * hv))
    return [[1000 * row + i for i in part] for part in (q + k + v, z, b, a)]


def check(rows: Any) -> None:
    """Splits and merges ``rows(n, features)``, whose element ``i`` of row ``j`` is ``1000 * j + i``."""
    qkvz, ba = rows(3, 2 * HEADS[0] * HEADS[2] + 2 * HEADS[1] * HEADS[3]), rows(3, 2 * HEADS[1])
    for packing in ("interleaved", "contiguous"):
        parts = gdn.split(qkvz, ba, *HEADS, packing)
        for row in range(3):
            got = [part[row].reshape(-1).tolist() for part in parts]
            if got != expected(row, packing):
                raise AssertionError(f"split, {packing}: row {row} is {got}")
        again = gdn.merge(*parts, *HEADS, packing)
        if [part.tolist() for part in again] != [qkvz.tolist(), ba.tolist()]:
            raise AssertionError(f"merge, {packing}: not what was split")


def checks() -> list[tuple[str, Any]]:
    """A name and a maker of rows for everything that tensors can be here."""
    found = []
    if importlib.util.find_spec("numpy"):
        import numpy

        found.append(("NumPy", lambda n, f: 1000 * numpy.arange(n)[:, None] + numpy.arange(f)))
    if gdn._torch is not None:
        import torch

        def rows(device: str) -> Any:
            return lambda n, f: (1000 * torch.arange(n)[:, None] + torch.arange(f)).to(device)

        found.append(("PyTorch, cpu", rows("cpu")))
        if torch.cuda.is_available():
            names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
            found += [(f"PyTorch, {name}", rows(name)) for name in names]
    return found


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    print(
        f"gdn {gdn.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    for package in ("torch", "numpy", "jax", "triton", "sglang", "vllm", "transformers"):
        print(f"{package:>14}: {version(package)}")
    print(f"{'CPU':>14}: {_gdn.isa()}")
    try:
        devices = _gdn.cuda_devices()
    except (RuntimeError, ValueError) as error:
        devices = [f"none: {error}"]
    for device in devices or ["none: the driver has no device"]:
        print(f"{'GPU':>14}: {device}")
    failed = False
    for name, rows in checks():
        try:
            check(rows)
            print(f"{'self-check':>14}: passed ({name})")
        except Exception as error:  # whatever it is, it is to be reported
            failed = True
            print(f"{'self-check':>14}: FAILED ({name}): {error}")
    if not checks():
        print(f"{'self-check':>14}: skipped: neither PyTorch nor NumPy is installed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
