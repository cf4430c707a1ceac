"""What split and merge are, in PyTorch's own views, and tensors to hold it against."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor

#: The elements' own bits, which compare equal to themselves.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def split(
    mixed_qkvz: Tensor, mixed_ba: Tensor, hk: int, hv: int, dk: int, dv: int, packing: str
) -> list[Tensor]:
    """Five lines of views, and a copy of each."""
    groups = hk if packing == "interleaved" else 1
    n, k, v, h = mixed_qkvz.shape[0], hk // groups * dk, hv // groups * dv, hv // groups
    *qkv, z = mixed_qkvz.reshape(n, groups, 2 * (k + v)).split([k, k, v, v], dim=2)
    b, a = mixed_ba.reshape(n, groups, 2 * h).split([h, h], dim=2)
    parts = [torch.cat([part.reshape(n, groups * part.shape[2]) for part in qkv], 1), z.reshape(n, hv, dv)]
    dense = torch.contiguous_format
    return [part.clone(memory_format=dense) for part in [*parts, b.reshape(n, hv), a.reshape(n, hv)]]


def bits(tensor: Tensor) -> Tensor:
    """The same elements as integers of their size."""
    return tensor.resolve_conj().resolve_neg().contiguous().view(BITS[tensor.element_size()])


def split_bits(mixed_qkvz: Tensor, mixed_ba: Tensor, heads: tuple[int, ...], packing: str) -> list[Tensor]:
    """The parts' bits. Integers are what PyTorch copies without a look at them."""
    return split(bits(mixed_qkvz), bits(mixed_ba), *heads, packing)


def features(heads: tuple[int, int, int, int]) -> dict[str, int]:
    """How wide a row of each argument is."""
    hk, hv, dk, dv = heads
    qk, v = hk * dk, hv * dv
    return dict(mixed_qkvz=2 * (qk + v), mixed_ba=2 * hv, mixed_qkv=2 * qk + v, z=v, b=hv, a=hv)


def anything(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Elements of random bits: NaNs with payloads, infinities and subnormals among them."""
    size = dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    made = torch.randint(0, high, (*shape[:-1], shape[-1] * size), dtype=torch.uint8, generator=generator)
    return made.view(dtype).to(device)


def packed(
    n: int,
    heads: tuple[int, ...],
    dtype: torch.dtype,
    ba_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Both inputs of a split."""
    wide = features(heads)
    return (
        anything((n, wide["mixed_qkvz"]), dtype, device, seed=n),
        anything((n, wide["mixed_ba"]), ba_dtype or dtype, device, seed=n + 1),
    )


class Guarded(NamedTuple):
    """A tensor whose rows lie in a wider buffer, poison around and between them."""

    buffer: Tensor
    view: Tensor
    before: Tensor
    inside: Tensor

    @classmethod
    def make(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: str, gap: int = 0, offset: int = 0
    ) -> Guarded:
        """`offset` and `gap` in elements. Every byte is poison: of floats, a NaN."""
        n, wide = shape[0], 1
        for dim in shape[1:]:
            wide *= dim
        buffer = torch.full(((offset + n * (wide + gap) + 64) * dtype.itemsize,), 0xFF, dtype=torch.uint8)
        buffer = buffer.to(device).view(dtype)
        strides = [1]
        for dim in reversed(shape[2:]):
            strides.insert(0, strides[0] * dim)
        view = buffer.as_strided(shape, (wide + gap, *strides), offset)
        inside = torch.zeros(buffer.shape, dtype=torch.bool, device=device)
        inside.as_strided(shape, view.stride(), offset).fill_(True)
        return cls(buffer, view, bits(buffer).clone(), inside)

    @classmethod
    def holding(cls, tensor: Tensor, gap: int, offset: int) -> Guarded:
        """With the elements of a tensor."""
        made = cls.make(tuple(tensor.shape), tensor.dtype, str(tensor.device), gap, offset)
        made.view.copy_(tensor)
        return made

    def is_whole(self) -> bool:
        """Whether all that is not the tensor's is as it was."""
        return torch.equal(bits(self.buffer)[~self.inside], self.before[~self.inside])

    def is_untouched(self) -> bool:
        """Whether all of it is."""
        return torch.equal(bits(self.buffer), self.before)


def same(got: object, expected: list[Tensor]) -> None:
    """Holds results to the bits that are expected, and to the shapes and strides of contiguous tensors."""
    assert type(got) is tuple and len(got) == len(expected)
    for one, other in zip(got, expected):
        assert one.shape == other.shape
        assert one.stride() == other.stride()
        assert torch.equal(bits(one), other)
