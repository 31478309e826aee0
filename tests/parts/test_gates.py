"""Gates, masks and rates: they change what they should and not a bit more."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headstart.parts.coupling import Coupling, find_coupling
from headstart.parts.cutting import cut
from headstart.parts.gates import Gates, per_group
from headstart.parts.head import find_head
from headstart.parts.importance import magnitudes, ranks, taylor
from headstart.parts.scaled import fold, run_scaled

X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3


def built(name: str = "test_resnet") -> tuple[nn.Module, Coupling, Gates, Tensor]:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, **({"img_size": 32} if "vit" in name else {})).eval()
    found = find_coupling(net, find_head(net), X)
    return net, found, Gates(net, found), torch.ones(found.units, dtype=torch.bool)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("training", [False, True])
def test_gates_of_one_change_no_bit(name: str, training: bool) -> None:
    net, _, gates, keep = built(name)
    plain = copy.deepcopy(net).train(training)
    net.train(training)
    torch.manual_seed(1)
    expected = plain(X)
    torch.manual_seed(1)
    assert torch.equal(gates.run(net, X, keep), expected)
    for ours, theirs in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)  # statistics move as they would


def test_the_score_is_what_the_loss_changes_to_first_order() -> None:
    net, _, gates, keep = built()
    net, gates, x = net.double(), gates.double(), X.double()
    with torch.no_grad():
        gates.delta.uniform_(-0.2, 0.2)
    alpha = gates.alpha.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(gates.run(net, x, keep, alpha=alpha), Y), [alpha])
    for j in range(0, len(alpha), 97):
        e = torch.zeros_like(alpha)
        e[j] = 1e-5
        with torch.no_grad():
            up, down = (
                cross_entropy(gates.run(net, x, keep, alpha=alpha * (1 + sign * e)), Y) for sign in (1, -1)
            )
        assert float(up - down) / 2e-5 == pytest.approx(
            float((gradient[j] * alpha[j]).detach()), rel=1e-4, abs=1e-9
        )


def test_taylor_adds_up_what_goes_together() -> None:
    """Restated with a gate as a module behind every norm, one batch at a time."""
    net, found, gates, keep = built()
    net, gates, x = net.double(), gates.double(), X.double()
    batches = [(x[:4], Y[:4]), (x[4:], Y[4:])]
    values = {
        name: torch.ones(len(unit), dtype=x.dtype, requires_grad=True) for name, unit in found.gates.items()
    }

    def hook(name: str):  # type: ignore[no-untyped-def]
        def behind(module: nn.Module, given: object, made: Tensor) -> Tensor:
            return made * values[name][:, None, None]

        return behind

    # timm's norms have their activation inside; here each is positive, so that a gate may follow it.
    hooks = [net.get_submodule(name).register_forward_hook(hook(name)) for name in found.gates]
    expected = torch.zeros(found.units, dtype=x.dtype)
    signed = torch.zeros(found.units, dtype=x.dtype)
    for some, labels in batches:
        gradients = torch.autograd.grad(cross_entropy(net(some), labels), list(values.values()))
        both = torch.zeros(found.units, dtype=x.dtype)
        for unit, gradient in zip(found.gates.values(), gradients, strict=True):
            for row, u in enumerate(unit.tolist()):
                if u >= 0:
                    expected[u] += gradient[row].abs() / 2
                    both[u] += gradient[row]
        signed += both.abs() / 2
    for each in hooks:
        each.remove()

    def logits(x: Tensor, alpha: Tensor) -> Tensor:
        return gates.run(net, x, keep, alpha=alpha)

    assert torch.allclose(taylor(gates, logits, cross_entropy, batches), expected, rtol=1e-9)
    assert torch.allclose(taylor(gates, logits, cross_entropy, batches, signed=True), signed, rtol=1e-9)
    of_mean = taylor(gates, logits, cross_entropy, [(x[:4], Y[:4])], of_mean=True)
    assert torch.allclose(of_mean, taylor(gates, logits, cross_entropy, [(x[:4], Y[:4])]), rtol=1e-9)
    assert not torch.allclose(
        taylor(gates, logits, cross_entropy, batches, of_mean=True), expected, rtol=1e-3
    )
    assert all(p.grad is None for p in [*net.parameters(), *gates.parameters()])


def test_before_a_norm_that_looks_at_the_batch_a_gate_has_no_gradient() -> None:
    """The trap: why BatchNorm keeps its statistics while weighing, and why gates stand behind it."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-12), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 3)).double().train()
    with torch.no_grad():
        net[1].bias.normal_()

    def pull(layer: str) -> float:
        alpha = torch.ones(6, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            cross_entropy(run_scaled(net, {layer: alpha}, X.double()), Y), [alpha]
        )
        return float(gradient.abs().max())

    assert pull("0") < 1e-8 < 1e-3 < pull("1")


def test_folding_changes_nothing() -> None:
    net, _, gates, keep = built("tf_efficientnet_lite0")
    with torch.no_grad():
        gates.delta.uniform_(-0.5, 0.5)
        keep[::3] = False
        expected = gates.run(net, X, keep)
        fold(net, gates.factors(keep))
        assert (net(X) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_rate_changes_how_fast_a_filter_learns_and_nothing_that_is_said() -> None:
    """The step of β̂ · (W / β̂) is β̂² times that of W, before a norm as well."""
    net, found, gates, keep = built()
    net, gates, x = net.double().train(), gates.double(), X.double()
    rate = torch.rand(found.units, dtype=torch.float64) * 2 + 0.5
    plain = copy.deepcopy(net)
    gates.multiply_filters(net, 1 / rate)
    said = gates.run(net, x, keep, rate=rate)
    assert torch.allclose(said, plain(x), rtol=1e-9, atol=1e-12)
    for each, out in ((net, said), (plain, plain(x))):
        cross_entropy(out, Y).backward()
        with torch.no_grad():
            for parameter in each.parameters():
                parameter -= 0.1 * parameter.grad
    start = built()[0].double()
    gates.multiply_filters(net, rate)
    by = gates.filters(rate)
    for name in by:
        moved = net.get_submodule(name).weight - start.get_submodule(name).weight
        usual = plain.get_submodule(name).weight - start.get_submodule(name).weight
        assert torch.allclose(moved, usual * by[name].square().view(-1, 1, 1, 1), rtol=1e-6, atol=1e-12)


def test_hastened_gradients_are_multiplied_exactly() -> None:
    net, found, gates, keep = built()
    rate = torch.rand(found.units) + 0.5
    name = next(iter(gates.filters(rate)))
    gradients = []
    for hasten in (None, rate):
        net.zero_grad()
        out = gates.run(net, X, keep, hasten=hasten)
        cross_entropy(out, Y).backward()
        gradients.append(net.get_submodule(name).weight.grad.clone())
    assert torch.equal(gradients[1], gradients[0] * gates.filters(rate)[name].view(-1, 1, 1, 1))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_training_with_masks_is_training_the_cut_network(name: str) -> None:
    net, found, gates, keep = built(name)
    net, gates, x = net.double(), gates.double(), X.double()
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(found.units, generator=generator) < 0.6
    keep[torch.cumsum(torch.tensor([0, *found.sizes[:-1]]), 0)] = True
    cut_net = cut(copy.deepcopy(net), found.kept(keep))
    for module in (net, cut_net):
        module.train()
        for each in module.modules():
            if isinstance(each, nn.Dropout):
                each.eval()
    runs = ((net, lambda: gates.run(net, x, keep)), (cut_net, lambda: cut_net(x)))
    said = []
    for module, run in runs:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(run(), Y).backward()
            optimizer.step()
        module.eval()
        with torch.no_grad():
            said.append(run())
    assert (said[0] - said[1]).abs().max() <= 1e-11 * said[0].abs().max()
    again = cut(copy.deepcopy(net), found.kept(keep))
    for ours, theirs in zip(again.state_dict().values(), cut_net.state_dict().values(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_magnitudes_and_ranks_by_hand() -> None:
    net, found, gates, keep = built()
    norms = gates.norms(net)
    unit = int(found.out["layer1.0.conv1"][2])
    assert float(norms[unit]) == pytest.approx(float(net.layer1[0].conv1.weight[2].detach().norm()), rel=1e-6)
    scores = magnitudes(gates, net, found.group, keep)
    means = per_group(scores, found.group, keep)
    assert torch.allclose(means, torch.ones_like(means), atol=1e-5)
    placed = ranks(scores, found.group)
    for i, size in enumerate(found.sizes):
        mine = found.group == i
        assert sorted((placed[mine] * size).round().int().tolist()) == list(range(1, size + 1))
        assert placed[mine].argmax() == scores[mine].argmax()


def test_scores_without_pictures_are_refused() -> None:
    net, _, gates, keep = built()
    with pytest.raises(ValueError, match="no pictures"):
        taylor(gates, lambda x, a: gates.run(net, x, keep, alpha=a), cross_entropy, [])
