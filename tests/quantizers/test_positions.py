"""PositionQuantizer: rows by position, also behind a cache, and what its observer makes of a stream."""

import pytest
import torch

from lightning_quant.quantizers import PositionObserver, PositionQuantizer, Positions


def table(rows=3, open_ended=True, text="uint4_asym"):
    return PositionQuantizer(text, -1, Positions(), rows, open_ended)


def tokens(batch=4, count=7, sink=50.0):
    x = torch.randn(batch, count, 5, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= sink
    return x


def observed(quantizer, x):
    observer = PositionObserver(quantizer, "minmax", "here")
    assert torch.equal(observer(x), x)
    observer.freeze()
    return quantizer


def test_token_by_token_is_the_same_as_all_at_once():
    quantizer, x = table(text="int6_asym"), tokens()
    observed(quantizer, x)
    whole, pieces = quantizer(x), []
    for place in range(7):
        quantizer.positions.start = place
        pieces.append(quantizer(x[:, place : place + 1]))
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_a_loud_first_token_costs_the_others_nothing():
    x = tokens()
    positional, one = observed(table(text="int6_asym"), x), table(rows=1, text="int6_asym")
    observed(one, x)
    errors = [float((quantizer(x) - x)[:, 1:].square().mean()) for quantizer in (positional, one)]
    assert errors[0] < 0.01 * errors[1]


def test_positions_behind_a_closed_table_are_refused_and_behind_an_open_one_have_the_last_row():
    quantizer = observed(table(rows=7, open_ended=False), tokens())
    with pytest.raises(ValueError, match="7 positions of a sequence, and is asked for position 7"):
        quantizer(tokens(count=8))
    quantizer = observed(table(rows=2), tokens())
    assert quantizer(tokens(count=30)).shape == (4, 30, 5)


def test_ranks_agree_and_rows_that_were_never_met_share():
    x = tokens(count=2)
    both, halves = table(rows=4), table(rows=4)
    observed(both, x)
    observers = [PositionObserver(halves, "minmax") for _ in range(2)]
    for observer, half in zip(observers, x.chunk(2), strict=True):
        observer(half)
    observers[0].merge(observers[1].state())
    observers[0].freeze()
    assert torch.equal(both.scale, halves.scale) and both.scale[1] == both.scale[2] == both.scale[3]


def test_a_range_for_all_rows_and_formats_that_cannot_be():
    quantizer = table()
    quantizer.freeze(torch.tensor(0.0), torch.tensor(15.0))
    assert quantizer.scale.tolist() == [1, 1, 1]
    for text in ("int8_token_dynamic", "int8_channel"):
        with pytest.raises(ValueError, match="depend on the position"):
            table(text=text)
