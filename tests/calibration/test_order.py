from __future__ import annotations

import multiprocessing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_quant.calibration.order import deal, end_workers, index_batches, reader


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    world_size=st.integers(1, 4),
    batch_size=st.none() | st.integers(1, 5),
)
def test_the_ranks_share_all_samples_and_none_twice(sizes, world_size, batch_size):
    batches, start = [], 0
    for size in sizes:
        batches.append([f"sample {index}" for index in range(start, start + size)])
        start += size
    shares = [share for rank in range(world_size) for share in deal(batches, batch_size, rank, world_size)]
    assert sorted(position for share in shares for position in share.positions) == list(range(start))
    assert all(share.indices == [f"sample {position}" for position in share.positions] for share in shares)
    if batch_size is None:
        assert all(share.indices in batches for share in shares)
    else:
        assert max(len(share.indices) for share in shares) <= batch_size


@given(size=st.integers(1, 20), samples=st.integers(1, 25), batch_size=st.integers(1, 6), unshuffle=st.booleans())
def test_index_batches_hold_as_many_samples_as_asked_or_there_are(size, samples, batch_size, unshuffle):
    loader = DataLoader(range(size), batch_size=batch_size, shuffle=True, drop_last=True)
    batches = index_batches(loader, samples, unshuffle)
    drawn = [index for batch in batches for index in batch]
    assert len(drawn) == len(set(drawn)) == min(samples, size)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    if unshuffle:
        assert drawn == sorted(drawn)


def test_a_distributed_sampler_is_replaced_by_the_whole_order():
    data = list(range(5))
    sampler = DistributedSampler(data, num_replicas=2, rank=1)
    assert index_batches(DataLoader(data, batch_size=3, sampler=sampler), 9, unshuffle=False) == [[0, 1, 2], [3, 4]]


def test_the_readers_generator_is_a_copy():
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(list(range(4)), generator=generator, shuffle=True)
    before = generator.get_state()
    assert [int(batch) for batch in reader(loader, [[3], [0]])] == [3, 0]
    assert torch.equal(generator.get_state(), before)
    assert sorted(int(batch) for batch in loader) == [0, 1, 2, 3]


class AroundTheIterator(DataLoader):
    def __iter__(self):
        yield from super().__iter__()


@pytest.mark.parametrize("kind", [DataLoader, AroundTheIterator])
def test_workers_end_though_their_iterator_is_still_held(kind):
    others = set(multiprocessing.active_children())
    iterator = iter(kind(list(range(9)), num_workers=1))
    next(iterator)
    assert len(set(multiprocessing.active_children()) - others) == 1
    end_workers(iterator)
    assert set(multiprocessing.active_children()) == others
