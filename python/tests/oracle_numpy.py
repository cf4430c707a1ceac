"""The same op as lists of indices: for every feature that comes out, the one it was."""

from __future__ import annotations

import numpy as np


def order(hk: int, hv: int, dk: int, dv: int, packing: str) -> dict[str, np.ndarray]:
    """For every part, the features of `mixed_qkvz` (or `mixed_ba`) that it is made of."""
    r = hv // hk
    q, k, v, z, b, a = [], [], [], [], [], []
    for head in range(hk):
        start = head * (2 * dk + 2 * r * dv)
        for i in range(dk):
            q.append(start + i if packing == "interleaved" else head * dk + i)
            k.append(start + dk + i if packing == "interleaved" else hk * dk + head * dk + i)
        for value in range(r):
            which = head * r + value
            b.append(head * 2 * r + value if packing == "interleaved" else which)
            a.append(head * 2 * r + r + value if packing == "interleaved" else hv + which)
            for i in range(dv):
                v.append(
                    start + 2 * dk + value * dv + i
                    if packing == "interleaved"
                    else 2 * hk * dk + which * dv + i
                )
                z.append(
                    start + 2 * dk + (r + value) * dv + i
                    if packing == "interleaved"
                    else 2 * hk * dk + hv * dv + which * dv + i
                )
    return {name: np.array(part) for name, part in dict(mixed_qkv=q + k + v, z=z, b=b, a=a).items()}


def split(
    mixed_qkvz: np.ndarray, mixed_ba: np.ndarray, heads: tuple[int, ...], packing: str
) -> list[np.ndarray]:
    """The four parts, dense."""
    at = order(*heads, packing)
    z = mixed_qkvz[:, at["z"]].reshape(-1, heads[1], heads[3])
    parts = [mixed_qkvz[:, at["mixed_qkv"]], z, mixed_ba[:, at["b"]], mixed_ba[:, at["a"]]]
    return [np.ascontiguousarray(part) for part in parts]


def anything(shape: tuple[int, ...], dtype: object, seed: int = 0) -> np.ndarray:
    """Elements of random bits."""
    dtype = np.dtype(dtype)
    if dtype == np.bool_:
        return np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
    made = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return made.view(dtype).reshape(shape)


def packed(
    n: int, heads: tuple[int, ...], dtype: object, ba_dtype: object = None
) -> tuple[np.ndarray, np.ndarray]:
    """Both inputs of a split."""
    hk, hv, dk, dv = heads
    wide = 2 * (hk * dk + hv * dv)
    return anything((n, wide), dtype, n), anything((n, 2 * hv), ba_dtype or dtype, n + 1)


def same(got: object, expected: list[np.ndarray]) -> None:
    """Holds results to the bits, shapes and dtypes that are expected."""
    assert type(got) is tuple and len(got) == len(expected)
    for one, other in zip(got, expected):
        one = np.asarray(one)
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.tobytes() == other.tobytes()
