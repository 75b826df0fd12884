"""Rotations that are found for an activation, and what is smoothed and rotated online."""

import pytest
import torch
from torch import nn

from lightning_quant.layers import BlockRotation, Rotation, SmoothedRotation
from lightning_quant.transforms import fit_block_rotation, fold_smoothed, greedy_blocks, spreading, zigzag


def numbers(rows=256, channels=128, loud=None, factor=100.0):
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    for channel in () if loud is None else loud:
        x[:, channel] *= factor
    return x


def matrix(rotation):
    return rotation(torch.eye(rotation.size, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 12, 128])
def test_a_spreading_matrix_is_orthogonal_and_spreads_its_first_channel(size):
    q = spreading(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(q[0], torch.full((size,), size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize(("size", "block"), [(256, 128), (192, 64), (36, 12)])
def test_what_is_found_is_a_rotation_and_its_inverse_undoes_it(size, block):
    x = numbers(64, size, loud=[3, size - 1])
    rotation = BlockRotation(size, block)
    fit_block_rotation(rotation, x, steps=16)
    q = matrix(rotation)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation(rotation(x), inverse=True), x, atol=1e-3, rtol=1e-4)


def test_one_channel_that_stands_out_is_for_greedy_steps_and_many_are_for_hadamard():
    def peaks(loud):
        x, rotation = numbers(loud=loud), BlockRotation(128)
        fit_block_rotation(rotation, x)
        return float(rotation(x).abs().max()), float(Rotation(128, "hadamard", 0)(x).abs().max())

    greedy, hadamard = peaks([17])
    assert greedy < hadamard < 0.1 * float(numbers(loud=[17]).abs().max())
    greedy, hadamard = peaks(list(range(0, 128, 16)))
    assert hadamard < greedy


def test_the_greedy_steps_never_widen_the_spread():
    for x in (numbers(), numbers(loud=[5])):
        rotated = x @ greedy_blocks(x, 128, steps=32)[0]
        assert rotated.max() - rotated.min() <= x.max() - x.min()


def test_channels_are_dealt_out_from_groups_of_neighbours_in_rank():
    order = zigzag(torch.arange(20, 0, -1).float(), group=9)
    assert order[:3].tolist() == [0, 9, 18]
    assert sorted(order.tolist()) == list(range(20))


@pytest.mark.parametrize("kind", ["none", "hadamard", "greedy"])
@pytest.mark.parametrize("size", [24, 1152])
def test_smoothed_and_rotated_a_layer_computes_what_it_did_and_back(kind, size):
    layer, x = nn.Linear(size, 7), numbers(9, size)
    exact, weight = layer(x), layer.weight.detach().clone()
    smoothed = SmoothedRotation(size, kind, seed=0, block=64 if kind == "greedy" else None)
    smoothed.scale.uniform_(0.2, 5.0)
    if kind == "greedy":
        fit_block_rotation(smoothed.rotation, x * smoothed.scale, steps=4)
    fold_smoothed(layer, smoothed)
    torch.testing.assert_close(layer(smoothed(x)), exact, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(layer.weight, weight)
    fold_smoothed(layer, smoothed, inverse=True)
    torch.testing.assert_close(layer.weight, weight, atol=1e-5, rtol=1e-4)
