"""Tensor parallel: what the ranks split of their shards, put together, is what one splits of all."""

import pytest

torch = pytest.importorskip("torch")

import oracle

import gdn

HEADS = (4, 12, 16, 32)


def rank_of(rank, ranks, backend, device, file):
    torch.distributed.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=ranks)
    try:
        if device == "cuda":
            device = f"cuda:{rank % torch.cuda.device_count()}"
        dk, dv = HEADS[2:]
        shard = gdn.Heads(*HEADS).shard(ranks)
        qkvz, ba = oracle.packed(17, HEADS, torch.float32, device=device)
        mine = [one.chunk(ranks, 1)[rank] for one in (qkvz, ba)]
        qkv, z, b, a = gdn.split(*mine, *shard)
        assert {part.device for part in (qkv, z, b, a)} == {torch.device(device)}
        q, k, v = qkv.split([shard[0] * dk, shard[0] * dk, shard[1] * dv], 1)
        whole = []
        for part in (q, k, v, z, b, a):
            part = part.cpu() if backend == "gloo" else part
            gathered = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(ranks)]
            torch.distributed.all_gather(gathered, part.contiguous())
            whole.append(torch.cat(gathered, 1))
        where = whole[0].device
        expected = oracle.split_bits(qkvz.to(where), ba.to(where), HEADS, "interleaved")
        oracle.same((torch.cat(whole[:3], 1), *whole[3:]), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.large
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("backend", "device"), [("gloo", "cpu"), ("gloo", "cuda"), ("nccl", "cuda")])
def test_shards_put_together(backend, device, ranks, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Ranks that share a GPU speak through gloo; NCCL wants one each.
    needed = {"cpu": 0, "cuda": ranks if backend == "nccl" else 1}[device]
    if gpus < needed:
        pytest.skip(f"{needed} GPUs needed")
    torch.multiprocessing.spawn(rank_of, (ranks, backend, device, tmp_path / "ranks"), nprocs=ranks)


def test_heads_that_do_not_divide():
    assert gdn.Heads(16, 32, 128, 128).shard(4) == (4, 8, 128, 128)
    for ranks, message in (
        (3, "num_k_heads = 16 is not a multiple of tp_size = 3"),
        (0, "tp_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gdn.Heads(16, 32, 128, 128).shard(ranks)
