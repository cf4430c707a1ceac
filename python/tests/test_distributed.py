"""Tensor parallel: what the ranks split of their shards, put together, is what one splits of all."""

import pytest

torch = pytest.importorskip("torch")

import oracle  # noqa: E402

import gdn  # noqa: E402

HEADS = (4, 12, 16, 32)


def rank_of(rank, ranks, backend, file):
    torch.distributed.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        device = f"cuda:{rank}" if backend == "nccl" else "cpu"
        hk, hv, dk, dv = HEADS
        shard = (hk // ranks, hv // ranks, dk, dv)
        qkvz, ba = oracle.packed(17, HEADS, torch.float32, device=device)
        mine = [one.chunk(ranks, 1)[rank] for one in (qkvz, ba)]
        qkv, z, b, a = gdn.split(*mine, *shard)
        q, k, v = qkv.split([shard[0] * dk, shard[0] * dk, shard[1] * dv], 1)
        whole = []
        for part in (q, k, v, z, b, a):
            gathered = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks)]
            torch.distributed.all_gather(gathered, part.contiguous())
            whole.append(torch.cat(gathered, 1))
        expected = oracle.split_bits(qkvz, ba, HEADS, "interleaved")
        oracle.same((torch.cat(whole[:3], 1), *whole[3:]), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_shards_put_together(backend, ranks, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    if backend == "nccl" and (not torch.cuda.is_available() or torch.cuda.device_count() < ranks):
        pytest.skip(f"{ranks} GPUs needed")
    torch.multiprocessing.spawn(rank_of, (ranks, backend, tmp_path / "ranks"), nprocs=ranks)
