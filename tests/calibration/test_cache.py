"""Columns of samples in memory and on disk."""

import errno
import os

import pytest
import torch

from lightning_quant.calibration import SampleCache


def filled(folder=None):
    cache = SampleCache(5, folder)
    x, y = torch.arange(20.0).view(5, 4), torch.arange(5)
    cache.put(0, [x[:2], y[:2]])
    cache.put(2, [x[2:], y[2:]])
    return cache, x, y


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_come_back_in_any_order(tmp_path, on_disk):
    cache, x, y = filled(tmp_path / "cache" if on_disk else None)
    rows = torch.tensor([4, 0, 4])
    assert all(map(torch.equal, cache.take(rows), [x[rows], y[rows]]))
    assert cache.nbytes == 20 * 4 + 5 * 8


def test_files_are_gone_when_closed(tmp_path):
    cache, _, _ = filled(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    cache.close()
    assert not list(tmp_path.iterdir())


def test_samples_of_another_shape_are_refused():
    cache, _, y = filled()
    with pytest.raises(ValueError, match=r"\(4,\) and \(3,\) cannot be kept together: pad or crop"):
        cache.put(0, [torch.zeros(1, 3), y[:1]])


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for .* MB of cached samples .* cache='recompute'"):
        filled(tmp_path)
    assert not list(tmp_path.iterdir())
