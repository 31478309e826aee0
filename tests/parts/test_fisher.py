"""The Fisher information: its definition, closed forms, and files of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.parts.fisher import Fisher, estimate, load, save
from headstart.parts.frozen import fingerprint

D = torch.float64


def linear(weight: Tensor) -> nn.Linear:
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(D)
    with torch.no_grad():
        net.weight.copy_(weight)
    return net


def softmax_regression(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    """A network, pictures [400, 5], and F = mean_i p_k (1 − p_k) x_d² [3, 5]."""
    torch.manual_seed(seed)
    net, x = linear(torch.randn(3, 5, dtype=D)), torch.randn(400, 5, dtype=D)
    p = net(x).softmax(1).detach()
    return net, x, ((p * (1 - p)).T @ x.square()) / len(x)


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(4, 3),
    ).to(D)
    for _ in range(3):
        net(torch.randn(8, 3, 8, 8, dtype=D))
    return net


def pictures(count: int = 6) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, 8, 8, dtype=D)


def test_closed_form_of_softmax_regression() -> None:
    """∂ log p_k / ∂W_jd = (1[j=k] − p_j) x_d, whose expected square is p_j (1 − p_j) x_d²."""
    net, x, closed = softmax_regression()
    exact = estimate(net, [(x, None)], samples=None)
    torch.testing.assert_close(exact.diagonal["weight"], closed, rtol=1e-12, atol=0)


def test_golden() -> None:
    """Two classes, weights zero, x = (1, 2): p (1 − p) x² = .25 · (1, 4)."""
    net, x = linear(torch.zeros(2, 2, dtype=D)), torch.tensor([[1.0, 2.0]], dtype=D)
    found = estimate(net, [(x, None)], samples=None).diagonal["weight"]
    assert found.tolist() == [[0.25, 1.0], [0.25, 1.0]]


def test_drawn_labels_are_unbiased() -> None:
    """One label per picture: the mean over many seeds is the closed form, within five standard errors."""
    net, x, _ = softmax_regression()
    x = x[:40]
    p = net(x).softmax(1).detach()
    closed = ((p * (1 - p)).T @ x.square()) / len(x)
    runs = torch.stack(
        [estimate(net, [(x, None)], samples=1, seed=seed).diagonal["weight"] for seed in range(60)]
    )
    error = runs.std(0) / len(runs) ** 0.5
    assert ((runs.mean(0) - closed).abs() < 5 * error).all()
    assert (runs.std(0) > 0).all()  # they are drawn


def test_more_labels_come_nearer() -> None:
    net, x, closed = softmax_regression()
    off = [
        (estimate(net, [(x[:100], None)], samples=samples).diagonal["weight"] - closed).norm().item()
        for samples in (1, 3000)
    ]
    exact = estimate(net, [(x[:100], None)], samples=None).diagonal["weight"]
    many = estimate(net, [(x[:100], None)], samples=3000).diagonal["weight"]
    torch.testing.assert_close(many, exact, rtol=0.1, atol=0)
    assert off[1] < off[0]


def test_it_is_not_the_square_of_the_mean_gradient() -> None:
    """The classic mistake is off by about the number of pictures; here 1/400."""
    net, x, closed = softmax_regression()
    labels = torch.multinomial(net(x).softmax(1), 1).flatten()
    mean = torch.autograd.grad(net(x).log_softmax(1)[torch.arange(len(x)), labels].mean(), [net.weight])[0]
    assert mean.square().mean() < 0.05 * closed.mean()
    sampled = estimate(net, [(x, None)]).diagonal["weight"]
    assert 0.7 < sampled.mean() / closed.mean() < 1.4


def test_definition_on_a_convolutional_network() -> None:
    """Σ_k f_k (∂ log f_k)², picture by picture and class by class, in eval mode."""
    net, x = convolutional(), pictures()
    found = estimate(net, [(x[:4], None), (x[4:], None)], samples=None)
    net.eval()
    names, weights = zip(*net.named_parameters(), strict=True)
    expected = [torch.zeros_like(w) for w in weights]
    for picture in x:
        log_f = net(picture[None]).log_softmax(1)[0]
        for k in range(3):
            scores = torch.autograd.grad(log_f[k], weights, retain_graph=True)
            for total, score in zip(expected, scores, strict=True):
                total += log_f[k].exp().detach() * score**2 / len(x)
    assert list(found.diagonal) == list(names)
    for name, want in zip(names, expected, strict=True):
        torch.testing.assert_close(found.diagonal[name], want, rtol=1e-12, atol=1e-18)


def test_the_network_stays_as_it_is() -> None:
    net = convolutional().train()
    before, flags = fingerprint(net), [p.requires_grad_(False) for p in net.parameters()]
    with torch.no_grad():
        found = estimate(net, [(pictures(), None)])
    assert fingerprint(net) == before == found.source
    assert net.training and not any(p.requires_grad or p.grad is not None for p in flags)


def test_draws_are_the_seeds_and_nobody_elses() -> None:
    net, x = convolutional(), pictures()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    once = estimate(net, [(x, None)], samples=2, seed=3).diagonal
    assert torch.equal(torch.get_rng_state(), state)
    in_batches = estimate(net, ((each, None) for each in x.split(2)), samples=2, seed=3).diagonal
    other = estimate(net, [(x, None)], samples=2, seed=4).diagonal
    for name, value in once.items():
        torch.testing.assert_close(in_batches[name], value, rtol=1e-12, atol=1e-18)
    assert any(not torch.allclose(other[name], value) for name, value in once.items())


def test_at_most_so_many_pictures() -> None:
    net, x = convolutional(), pictures()

    def endless() -> Iterator[tuple[Tensor, None]]:
        while True:
            yield x, None

    done: list[int] = []
    found = estimate(net, endless(), pictures=8, step=done.append)
    assert found.pictures == 8 and done == list(range(1, 9))
    twice = estimate(net, [(torch.cat([x, x[:2]]), None)])
    for name, value in twice.diagonal.items():
        torch.testing.assert_close(found.diagonal[name], value, rtol=1e-12, atol=1e-18)


def test_pictures_are_seen_as_the_network_expects_them() -> None:
    net, x = convolutional(), pictures()
    found = estimate(net, [(x, None)], view=lambda x: 2 * x).diagonal
    expected = estimate(net, [(2 * x, None)]).diagonal
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_half_precision_and_autocast_are_left_behind() -> None:
    net, x = convolutional().float(), pictures().float()
    expected = estimate(net, [(x, None)], samples=None).diagonal
    with torch.autocast("cpu", torch.bfloat16):
        found = estimate(net, [(x, None)], samples=None).diagonal
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    half = estimate(net.bfloat16(), [(x.bfloat16(), None)], samples=None).diagonal
    assert all(value.dtype == torch.float32 for value in half.values())


def test_unused_and_tied_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    found = estimate(Odd(), [(torch.randn(4, 3), None)], samples=None).diagonal
    assert "b.weight" not in found and found["a.weight"].any()
    assert not found["unused.weight"].any()


def test_nothing_to_look_at_and_overflow_are_refused() -> None:
    with pytest.raises(MethodError, match="at least one picture"):
        estimate(convolutional(), [])
    with pytest.raises(MethodError, match="not finite"):
        estimate(convolutional(), [(pictures() * torch.inf, None)])


# ---------------------------------------------------------------------- roots


def of(diagonal: dict[str, Tensor]) -> Fisher:
    return Fisher(diagonal, "source", 1, 1, 0)


def test_roots() -> None:
    """By hand: F = (1, 2), (9): mean 4; over the mean .25, .5, 2.25; cut at 1; plus .11."""
    net = nn.ParameterDict({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)})
    fisher = of({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([9.0]), "c": torch.tensor([100.0])})
    chosen = [net["a"], net["b"]]
    square = [root.square().tolist() for root in fisher.roots(net, chosen)]
    assert square == [pytest.approx([1, 2]), pytest.approx([9])]
    square = [root.square().tolist() for root in fisher.roots(net, chosen, normalise=True)]
    assert square == [pytest.approx([0.25, 0.5]), pytest.approx([2.25])]
    adjusted = fisher.roots(net, chosen, normalise=True, most=1.0, eps=0.11)
    assert [r.square().tolist() for r in adjusted] == [pytest.approx([0.36, 0.61]), pytest.approx([1.11])]


def test_roots_lie_as_the_weights_do() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    fisher = of({"weight": torch.rand(4, 3, 3, 3)})
    (root,) = fisher.roots(net, [net.weight])
    assert root.stride() == net.weight.stride()
    torch.testing.assert_close(root.square(), fisher.diagonal["weight"])


def test_roots_of_nothing_are_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(MethodError, match="zero for every weight"):
        of({"weight": torch.zeros(2, 2)}).roots(net, [net.weight])
    assert of({"weight": torch.zeros(2, 2)}).roots(net, [net.weight], normalise=True, eps=4)[0].unique() == 2
    with pytest.raises(MethodError, match=r"no Fisher information for 'bias'\. Make one with: headstart"):
        of({"weight": torch.ones(2, 2)}).roots(net, [net.bias])
    with pytest.raises(MethodError, match="for 'weight'"):
        of({"weight": torch.ones(2, 3)}).roots(net, [net.weight])


# ---------------------------------------------------------------------- files


def test_a_file_holds_all(tmp_path: Path) -> None:
    net = convolutional().float()
    fisher = estimate(net, [(pictures().float(), None)], samples=2, seed=3, inputs="noise")
    path = tmp_path / "f.safetensors"
    save(fisher, path)
    assert [each.name for each in tmp_path.iterdir()] == ["f.safetensors"]
    read = load(path, source=fingerprint(net))
    assert read.provenance == fisher.provenance
    assert read.provenance["pictures"] == 6 and read.provenance["inputs"] == "noise"
    assert read.diagonal.keys() == fisher.diagonal.keys()
    assert all(torch.equal(read.diagonal[name], value) for name, value in fisher.diagonal.items())
    with safe_open(path, framework="pt") as file:  # what other programs see
        assert file.metadata()["samples"] == "2" and file.metadata()["headstart"]


def test_exact_provenance_comes_back(tmp_path: Path) -> None:
    save(dataclasses.replace(of({"w": torch.ones(1)}), samples=None), tmp_path / "f")
    assert load(tmp_path / "f", source="source").samples is None


def broken(path: Path, whole: bytes, how: str) -> None:
    tensors, metadata = {"w": torch.ones(1)}, {"what": "diagonal Fisher information"}
    path.write_bytes(
        {
            "cut": whole[:-2],
            "text": b"no tensors",
            "empty": b"",
            "weights": safetensors.torch.save(tensors),
            "lacks": safetensors.torch.save(tensors, metadata),
            "negative": whole[:-4] + safetensors.torch.save({"w": -torch.ones(1)})[-4:],
        }[how]
    )


@pytest.mark.parametrize("how", ["cut", "text", "empty", "weights", "lacks", "negative"])
def test_broken_files_are_refused_in_one_sentence(tmp_path: Path, how: str) -> None:
    path = tmp_path / "f.safetensors"
    save(of({"w": torch.ones(1)}), path)
    broken(path, path.read_bytes(), how)
    with pytest.raises(MethodError, match=re.escape(str(path))) as raised:
        load(path, source="source")
    said = str(raised.value)
    assert "\n" not in said and "headstart fisher DATA" in said
    assert ("holds no Fisher information" if how == "weights" else "is broken (") in said


def test_files_that_are_not_there_and_of_other_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="There is no Fisher file"):
        load(tmp_path / "f", source="source")
    save(of({"w": torch.ones(1)}), tmp_path / "f")
    with pytest.raises(MethodError, match=r"made from another checkpoint \(source, here 0123456789ab\)"):
        load(tmp_path / "f", source="0123456789abcdef")
