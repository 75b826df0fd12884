"""What goes into a unit and what comes out, sample by sample."""

import pytest
import torch
from torch import nn

from lightning_quant.calibration import record, signature


class Block(nn.Module):
    """Two inputs, one of them a keyword, a mask that is the same for all samples, a tuple out."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, *, context, mask=None, scale=1.0):
        return self.fc(x * scale) + context.mean(0).unsqueeze(1), mask


class Net(nn.Module):
    def __init__(self, times=1):
        super().__init__()
        self.block, self.times = Block(), times

    def forward(self, x):
        context = x.transpose(0, 1)  # samples along axis 1
        for _ in range(self.times):
            x, _ = self.block(x, context=context, mask=torch.ones(3, 3), scale=0.5)
        return x.relu_()


def seen(net, name="block", inner=None):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    unit = net.get_submodule(name)
    two, one = (record(unit, lambda n=n: net(x[:n]), inner=inner) for n in (2, 1))
    return x, two, one


def test_the_samples_are_found_along_whatever_axis():
    _, two, one = seen(Net())
    found = signature("block", two, one)
    axes = [None if axis is None else axis.position for axis in found.inputs]
    assert axes == [0, 1, None, None] and found.calls == 1
    assert [axis is None for axis in found.outputs] == [False, True]  # the mask that is handed back has no samples


def test_the_unit_computes_the_same_from_columns_in_any_order():
    net = Net()
    _, two, one = seen(net)
    found = signature("block", two, one)
    columns = [column[torch.tensor([1, 0])] for column in found.columns(two[0])]
    args, kwargs = found.arguments(columns)
    assert kwargs["scale"] == 0.5 and kwargs["mask"].shape == (3, 3)
    (out,) = found.results(net.block(*args, **kwargs))
    assert torch.allclose(out, found.results_of(two[0])[0][torch.tensor([1, 0])])


def test_windows_are_several_rows_of_one_sample():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):  # (samples, 8, 4) -> (4 windows a sample, 2, 4)
            return self.fc(x.reshape(-1, 2, 4)).reshape(x.shape)

    net, x = Windows(), torch.randn(2, 8, 4)
    two, one = (record(net.fc, lambda n=n: net(x[:n])) for n in (2, 1))
    found = signature("fc", two, one)
    (column,) = found.columns(two[0])
    assert column.shape == (2, 4, 2, 4)
    args, _ = found.arguments([column])
    assert torch.equal(args[0], x.reshape(-1, 2, 4))


def test_a_unit_that_runs_twice_is_recorded_twice():
    _, two, one = seen(Net(times=2))
    assert len(two) == 2 and signature("block", two, one).calls == 2
    assert not torch.equal(two[0].inputs[0], two[1].inputs[0])


def test_the_model_stops_behind_the_unit():
    net, ran = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    net[1].register_forward_hook(lambda *_: ran.append(1))
    record(net[0], lambda: net(torch.ones(1, 2)), calls=1)
    assert not ran and not net[0]._forward_hooks and not net[0]._forward_pre_hooks


def test_recorded_outputs_survive_a_change_in_place():
    _, two, _ = seen(Net())
    assert (two[0].outputs[0] < 0).any()  # the relu_ behind the block changed its output


def test_outputs_of_the_layers_inside():
    net = Net()
    _, two, one = seen(net, inner={"block.fc": net.block.fc})
    found = signature("block", two, one)
    assert found.inner["block.fc"].position == 0 and two[0].inner["block.fc"].shape == (2, 3, 4)


def test_a_unit_without_samples_is_refused():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.table(torch.ones(4))

    net, x = Constant(), torch.randn(2, 4)
    two, one = (record(net.table, lambda n=n: net(x[:n])) for n in (2, 1))
    with pytest.raises(ValueError, match=r"`table` cannot be reconstructed: no tensor .* granularity="):
        signature("table", two, one)


def test_a_unit_that_mixes_samples_is_refused():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):  # every pair of samples
            return self.fc((x[:, None] + x[None]).flatten(0, 1))

    net, x = Pairs(), torch.randn(2, 4)
    two, one = (record(net.fc, lambda n=n: net(x[:n])) for n in (2, 1))
    with pytest.raises(ValueError, match=r"`fc` cannot be reconstructed: for two samples .*\(4, 4\).*\(1, 4\)"):
        signature("fc", two, one)
