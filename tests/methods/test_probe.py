"""The probe against a solution stated on its own, and its corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.method import Batch
from headstart.methods.baseline.probe import Probe
from headstart.parts.features import features
from headstart.parts.logistic import GRID


def small_net(features_: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, features_, 3, stride=2),
        nn.BatchNorm2d(features_),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(features_, 7),
    )


def pictures(n: int, classes: int, seed: int, batch: int = 10) -> list[Batch]:
    made = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.randn(n, 3, 9, 9, generator=made) + 0.4 * torch.eye(classes, 3)[y][:, :, None, None]
    return list(zip(x.split(batch), y.split(batch), strict=True))


def solved(probe: Probe, train: list[Batch], val: list[Batch] | tuple[()] = ()) -> Probe:
    for _ in probe.phases(5, train, val):
        raise AssertionError("a probe has nothing to train")
    return probe


def seen(net: nn.Sequential, data: list[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """What the head sees, said plainly: everything before the last layer, in eval mode."""
    with torch.no_grad():
        x = torch.cat([net[:-1].eval()(x) for x, _ in data])
    return x.double().numpy(), torch.cat([y for _, y in data]).numpy()


@pytest.mark.parametrize("classes", [2, 3])
def test_agrees_with_scikit_learn_and_chooses_on_val(classes: int) -> None:
    train, val = pictures(60, classes, 1), pictures(30, classes, 2)
    probe = solved(Probe(small_net(), classes), train, val)

    (x, y), (held, truth) = seen(small_net(), train), seen(small_net(), val)
    losses = {}
    for C in GRID:
        # With two classes scikit-learn keeps the difference of the two rows: half the penalty is 2C.
        plain = make_pipeline(
            StandardScaler(), LogisticRegression(C=C * (2 if classes == 2 else 1), tol=1e-8, max_iter=5000)
        )
        losses[C] = (log_loss(truth, plain.fit(x, y).predict_proba(held)), plain)
    best = min(losses, key=lambda C: losses[C][0])
    assert probe.diagnostics() == {"C": best}

    with torch.no_grad():
        ours = probe.predict(torch.cat([x for x, _ in val])).softmax(-1)
    theirs = torch.from_numpy(losses[best][1].predict_proba(held))
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_formula(classes: int) -> None:
    """min Σ ℓ(W z + b) + 1/(2C) ‖W‖², z of unit variance: the gradient there is zero, by autograd."""
    C, train = 0.1, pictures(60, classes, 1)
    probe = solved(Probe(small_net(), classes, C=C), train)
    x, y = (torch.from_numpy(each) for each in seen(small_net(), train))
    mean, scale = x.mean(0), x.std(0, correction=0)
    head = probe.head_module
    W = (head.weight.detach().double() * scale).requires_grad_()  # the scaling, taken out again
    b = (head.bias.detach().double() + head.weight.detach().double() @ mean).requires_grad_()
    loss = nn.functional.cross_entropy((x - mean) / scale @ W.T + b, y, reduction="sum")
    (loss + W.square().sum() / (2 * C)).backward()
    assert W.grad is not None
    assert W.grad.abs().max() < 5e-3  # of a sum over 60 pictures
    assert b.grad is not None
    assert b.grad.abs().max() < 5e-3


def test_nothing_but_the_head_changes() -> None:
    probe = solved(Probe(small_net(), 3), pictures(60, 3, 1), pictures(30, 3, 2))
    before = small_net().state_dict()
    after = probe.net.state_dict()
    assert [name for name in before if name[0] != "5" and not torch.equal(before[name], after[name])] == []
    assert after["5.weight"].abs().sum() > 0


def test_it_never_sees_training_pictures_as_validation() -> None:
    """Where all labels of val are wrong the strongest penalty is best; no training loss would say so."""
    train, val = pictures(90, 3, 1), pictures(30, 3, 1)
    wrong = [(x, (y + 1) % 3) for x, y in val]
    honest = solved(Probe(small_net(), 3), train, val).diagnostics()["C"]
    fooled = solved(Probe(small_net(), 3), train, wrong).diagnostics()["C"]
    assert fooled == min(GRID)
    assert honest > fooled


def test_without_val_it_cross_validates() -> None:
    probe = solved(Probe(small_net(), 3), pictures(60, 3, 1))
    assert probe.diagnostics()["C"] in GRID


def test_given_c_is_taken_even_where_nothing_can_be_held_out() -> None:
    """One picture of a class: no folds, and the given penalty is still the given one."""
    lone = pictures(20, 2, 1, batch=20)[0]
    x, y = lone[0], torch.tensor([0] * 19 + [1])
    assert solved(Probe(small_net(), 2, C=0.3), [(x, y)]).diagnostics() == {"C": 0.3}
    assert solved(Probe(small_net(), 2), [(x, y)]).diagnostics()["C"] in GRID


def test_class_weights() -> None:
    """A weight of 3 on class 0 is three copies of its pictures."""
    train = pictures(60, 3, 1)
    x, y = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    thrice = [(torch.cat([x, x[y == 0], x[y == 0]]), torch.cat([y, y[y == 0], y[y == 0]]))]
    # Not to rounding: copies change the features' scale too, and with it the meaning of C, if by little.
    weighted = Probe(small_net(), 3, C=100.0)
    weighted.criterion = nn.CrossEntropyLoss(weight=torch.tensor([3.0, 1.0, 1.0]))
    solved(weighted, train)
    copied = solved(Probe(small_net(), 3, C=100.0), thrice)
    plain = solved(Probe(small_net(), 3, C=100.0), train)
    with torch.no_grad():
        a, b, c = (probe.predict(x).softmax(-1) for probe in (weighted, copied, plain))
    assert (a - b).abs().max() < 0.03
    assert (a - c).abs().max() > 0.1


def test_dead_features_are_ignored() -> None:
    net = small_net()
    with torch.no_grad():
        net[1].bias[2] = -1e3  # dead behind the ReLU
        net[1].weight[4], net[1].bias[4] = 0.0, 5.0  # constant
    probe = solved(Probe(net, 3), pictures(60, 3, 1), pictures(30, 3, 2))
    weight = probe.head_module.get_parameter("weight")
    assert weight.isfinite().all()
    assert not weight[:, [2, 4]].any()


def test_a_class_without_pictures_is_an_error() -> None:
    with pytest.raises(MethodError, match="class 3 has none"):
        solved(Probe(small_net(), 4), pictures(30, 3, 1))


def test_no_pictures_is_an_error() -> None:
    with pytest.raises(MethodError, match="no pictures"):
        solved(Probe(small_net(), 3), [])


class _HeadBeforePooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).mean((2, 3))


class _HeadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x).mean((2, 3))
        return self.head(z) + self.head(-z)


@pytest.mark.parametrize(
    ("net", "match"),
    [(_HeadBeforePooling(), "stands before the pooling"), (_HeadTwice(), "2 times for 1 batches")],
)
def test_heads_that_cannot_be_solved(net: nn.Module, match: str) -> None:
    with pytest.raises(MethodError, match=match):
        solved(Probe(net, 3), pictures(10, 3, 1))


def test_a_convolution_as_head_is_solved_too() -> None:
    net = small_net()
    convolutional = nn.Sequential(*net[:4], nn.Conv2d(6, 7, 1), nn.Flatten())
    train, val = pictures(60, 3, 1), pictures(30, 3, 2)
    a, b = solved(Probe(net, 3), train, val), solved(Probe(convolutional, 3), train, val)
    assert torch.equal(
        a.head_module.get_parameter("weight"), b.head_module.get_parameter("weight").flatten(1)
    )


def test_a_head_without_bias_keeps_none() -> None:
    net = nn.Sequential(*small_net()[:5], nn.Linear(6, 7, bias=False))
    probe = solved(Probe(net, 3), pictures(60, 3, 1), pictures(30, 3, 2))
    assert probe.head_module.bias is None


def test_features_are_what_the_head_sees() -> None:
    net, data = small_net(), pictures(25, 3, 1)
    net.train()
    x, y = features(net, "5", data)
    plain, labels = seen(small_net(), data)
    assert np.array_equal(x.double().numpy(), plain)
    assert np.array_equal(y.numpy(), labels)
    assert net[1].training  # as it was
    assert torch.equal(net[1].running_mean, torch.zeros(6))  # looked, not trained
    assert not net[5]._forward_pre_hooks
