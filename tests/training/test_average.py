import torch
from torch import nn

from headstart.training.average import Average


def test_the_average_is_the_exponential_mean_of_the_weights() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    average = Average(net, 0.5, 100)
    expected = net.weight.item()
    for i in range(1, 6):
        with torch.no_grad():
            net.weight.fill_(float(i))
        average.update()
        decay = min(0.5, (1 + i) / (10 + i))
        expected = decay * expected + (1 - decay) * i
    with average.applied():
        assert abs(net.weight.item() - expected) < 1e-12
    assert net.weight.item() == 5.0


def test_statistics_are_averaged_with_the_weights_and_frozen_weights_are_not() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net[0].requires_grad_(False)
    average = Average(net, 0.9, 100)
    assert len(average.live) == 4  # scale, shift, running mean and variance
    net[1].running_mean.fill_(8.0)
    average.update()
    with average.applied():
        assert 0 < net[1].running_mean[0] < 8


def test_decay_by_length() -> None:
    assert Average(nn.Linear(1, 1), 0, 100).decay == 0.9
    assert Average(nn.Linear(1, 1), 0, 5).decay == 0.0


def test_a_saved_average_goes_on_as_it_was() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 3)
    one = Average(net, 0.9, 50)
    one.update()
    two = Average(net, 0.9, 50)
    two.load({"mean": [m.clone() for m in one.mean], "updates": one.updates})
    with torch.no_grad():
        net.weight.mul_(3)
    one.update()
    two.update()
    assert all(torch.equal(a, b) for a, b in zip(one.mean, two.mean, strict=True))
