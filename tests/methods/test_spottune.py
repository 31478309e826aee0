"""SpotTune against its forward written out with the authors' two-logit Gumbel-softmax, and what must hold."""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart import registry
from headstart.errors import MethodError, ModelError
from headstart.method import Method
from headstart.methods.baseline.full import Full
from headstart.methods.route import spottune
from headstart.methods.route.spottune import SpotTune
from headstart.records import Recipe
from headstart.testing import Case, check_method, networks
from headstart.training.average import Average
from headstart.training.loop import fit
from headstart.training.machine import Machine


class Block(nn.Module):
    """A shortcut around two convolutions, as in the authors' ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (x + self.drop(h)).relu()


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        Block(6),
        Block(6),
        nn.Sequential(nn.Conv2d(6, 8, 2, 2), nn.BatchNorm2d(8)),
        Block(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return net


BLOCKS = ["2", "3", "4", "5"]  # "4" changes the map
SIZE = 10


def batches(n: int = 3, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, SIZE, SIZE, dtype=dtype), torch.arange(size) % 3) for _ in range(n)]


def build(net: nn.Module | None = None, *, seed: int = 1, **hyper: Any) -> SpotTune:
    net = small_net().double() if net is None else net
    torch.manual_seed(seed)
    return SpotTune(
        net, 3, example=torch.zeros(1, 3, SIZE, SIZE), **({"policy_width": 4, "policy_size": 8} | hyper)
    )


def perturb(method: SpotTune, by: float = 0.1, seed: int = 9) -> SpotTune:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in method.net.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return method


def choose(method: SpotTune, value: float | Tensor) -> None:
    """All pictures take this way, or these ways."""

    def routes(x: Tensor) -> Tensor:
        given = torch.as_tensor(value, dtype=x.dtype)
        return given.expand(len(x), len(method.units)) if given.ndim < 2 else given

    method.routes = routes


def run(method: Method, steps: int = 6, look: Any = None, **options: Any) -> list[float]:
    """Momentum steps through the method's own phases; the losses.

    Args:
        method: to train.
        steps: in each phase.
        look: called in a phase, before its first step and after its last.
        options: of the optimiser.
    """
    data, losses = batches(3), []
    torch.manual_seed(5)
    for phase in method.phases(2, data):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.05, momentum=0.9, **options)
        if look is not None:
            look()
        for step in range(steps):
            loss = method(*data[step % 3]).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if look is not None:
            look()
        for _ in range(phase.epochs):
            method.finished_epoch()
    return losses


def features(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net[:8](x)  # type: ignore[index]
    return out


def written_out(method: SpotTune, source: nn.Module, x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """x_l = m F̂(x) + (1 - m) F(x) with the two-class Gumbel-softmax of gyhui14/spottune; logits and m [B, L].

    There: logits + G, softmax over τ, argmax as one-hot, (hard - soft).detach() + soft, index 1: fine-tuning.
    """
    logits = method.policy(x).view(len(x), -1, 2)
    gumbel = -torch.log(-torch.log(uniform + 1e-20) + 1e-20)
    soft = torch.softmax((logits + gumbel) / method.tau, -1)
    hard = F.one_hot(soft.argmax(-1), 2).to(soft.dtype)
    m = ((hard - soft).detach() + soft)[..., 1]
    net = method.net
    h = net[1](net[0](x))
    for i, name in enumerate(BLOCKS):
        mine = m[:, i, None, None, None]
        h = mine * net.get_submodule(name)(h) + (1 - mine) * source.get_submodule(name)(h)
    return net[8](net[7](net[6](h))), m


def uniform_as_drawn(x: Tensor, seed: int) -> Tensor:
    """[B, L, 2]: the numbers that the method draws after this seed."""
    torch.manual_seed(seed)
    return torch.rand(2, len(x), len(BLOCKS)).movedim(0, -1)


# ---------------------------------------------------------------- the formula


@pytest.mark.parametrize("tau", [5.0, 0.5])
def test_agrees_with_the_formula(tau: float) -> None:
    method = perturb(build(tau=tau)).train()
    x, y = batches(1)[0]
    source = small_net().double().eval()
    twin = copy.deepcopy(method)
    logits, m = written_out(twin, source, x, uniform_as_drawn(x, 4))
    assert 0 < m.sum() < m.numel()
    theirs = F.cross_entropy(logits, y)
    theirs.backward()
    torch.manual_seed(4)
    loss = method(x, y)
    loss.total.backward()
    assert list(loss.parts) == ["task"]
    torch.testing.assert_close(loss.logits, logits.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.total, theirs, rtol=1e-12, atol=0)
    for (name, ours), other in zip(method.named_parameters(), twin.parameters(), strict=True):
        # the method's noise is a difference of two numbers in float32
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: n + m)


def test_agrees_with_the_global_terms() -> None:
    """λ₁ (Σ v - k)² + λ₂ Σ -v log v with their gradients, v the batch's mean of the choices."""
    method = perturb(build(routing="global", k=2, lam_k=0.3, lam_e=0.7)).train()
    x, y = batches(1)[0]
    twin = copy.deepcopy(method)
    logits, m = written_out(twin, small_net().double().eval(), x, uniform_as_drawn(x, 4))
    v = m.mean(0)
    assert bool(((v > 0) & (v < 1)).all())
    count, entropy = 0.3 * (v.sum() - 2) ** 2, 0.7 * -(v * torch.log(v)).sum()
    (F.cross_entropy(logits, y) + count + entropy).backward()
    torch.manual_seed(4)
    loss = method(x, y)
    loss.total.backward()
    torch.testing.assert_close(loss.parts["count"], count.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.parts["entropy"], entropy.detach(), rtol=1e-12, atol=1e-15)
    for ours, other in zip(method.policy.parameters(), twin.policy.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-5, atol=1e-8)


def test_golden_global_terms() -> None:
    """v = (1, 1/2, 1/4, 0), k = 1: (7/4 - 1)² = 9/16, and ½ ln 2 + ¼ ln 4 = ln 2; by hand."""
    method = build(routing="global", k=1, lam_k=1.0, lam_e=1.0)
    choose(method, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0.0]]).double())
    parts = method(*[each[:4] for each in batches(1)[0]]).parts
    assert parts["count"].item() == pytest.approx(9 / 16, abs=1e-12)
    assert parts["entropy"].item() == pytest.approx(math.log(2), abs=1e-4)  # v = 0 counts as 1e-6


@pytest.mark.parametrize("ways", [[1, 0, 1, 0], [0, 0, 1, 1]])
def test_global_terms_vanish_for_k_blocks_and_one_way(ways: list[float]) -> None:
    method = build(routing="global", k=2, lam_k=1.0, lam_e=1.0)
    choose(method, torch.tensor(ways, dtype=torch.float64))
    parts = method(*batches(1)[0]).parts
    assert parts["count"].item() == 0
    assert parts["entropy"].item() == pytest.approx(0, abs=1e-4)


# ---------------------------------------------------------------- both extremes


@pytest.mark.parametrize("stem", ["frozen", "routed"])
def test_all_frozen_is_the_pretrained_network_to_the_bit(stem: str) -> None:
    method, source = build(stem=stem), small_net().double().eval()
    nn.init.normal_(method.head_module.weight)
    choose(method, 0.0)
    x, _ = batches(1)[0]
    looked = []

    def look() -> None:
        for mode in (True, False):
            method.train(mode)
            with torch.no_grad():
                assert torch.equal(method.predict(x), method.net[8](features(source, x)))
            looked.append(mode)
        method.train()

    run(method, look=look)
    assert looked == [True, False] * 2


@pytest.mark.parametrize("stem", ["train", "routed"])
@pytest.mark.parametrize("downsample", ["own", "merge", "train"])
def test_all_tuned_is_plain_fine_tuning_to_the_bit(stem: str, downsample: str) -> None:
    method = build(stem=stem, downsample=downsample)
    choose(method, 1.0)
    plain = Full(small_net().double(), 3)
    ours, theirs = (run(each, weight_decay=1e-3) for each in (method, plain))
    assert ours == theirs
    assert theirs[-1] != theirs[0]
    for (name, value), other in zip(
        plain.net.state_dict().items(), method.net.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_at_the_start_any_route_says_what_the_source_says() -> None:
    method = build().eval()
    nn.init.normal_(method.head_module.weight)
    x, _ = batches(1)[0]
    expected = method.net[8](features(small_net().double().eval(), x))
    for seed in range(3):
        torch.manual_seed(seed)
        choose(method, torch.randint(0, 2, (len(x), 4)).double())
        torch.testing.assert_close(method.predict(x), expected, rtol=0, atol=0)


def test_the_policy_learns_nothing_until_the_copies_differ() -> None:
    """tuned - frozen is exactly nought at the start where both normalise alike, and so is the gradient."""
    method = build()
    method.norm = "eval"
    method.train()
    x, y = batches(1)[0]
    with torch.no_grad():
        method.head_module.weight.normal_()
    method(x, y).total.backward()
    assert not any(p.grad.any() for p in method.policy.parameters())
    method.zero_grad()
    perturb(method)(x, y).total.backward()
    assert all(p.grad.any() for p in method.policy.parameters())


def test_a_block_that_no_picture_took_learns_nothing() -> None:
    method = perturb(build()).train()
    choose(method, torch.tensor([1.0, 0.0, 1.0, 1.0]).double())
    method(*batches(1)[0]).total.backward()
    for name in BLOCKS:
        grads = [p.grad for p in method.net.get_submodule(name).parameters()]
        assert all(bool(g.any()) == (name != "3") for g in grads), name


# ---------------------------------------------------------------- frozen means frozen


def test_frozen_copies_stay_and_share_nothing() -> None:
    method, source = build(), small_net().double()
    run(method, weight_decay=0.1)
    ours = {p.untyped_storage().data_ptr() for p in [*method.parameters(), *method.buffers()]}
    for name in BLOCKS:
        frozen = method._frozen(name)
        assert not any(module.training for module in frozen.modules())
        for (key, value), other in zip(
            frozen.state_dict().items(), source.get_submodule(name).state_dict().values(), strict=True
        ):
            assert torch.equal(value, other), key
            assert value.untyped_storage().data_ptr() not in ours
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    own = {id(p) for phase in method.plan(2) for group in phase.groups for p in group.params}
    averaged = {id(t) for t in Average(method, 0.9, 10).live}
    for frozen_tensor in (*method.source.net.parameters(), *method.source.net.buffers()):
        assert id(frozen_tensor) not in own | averaged
    assert not any("source" in key for key in method.state_dict())


def test_adapted_norms_learn_and_nothing_else_of_a_frozen_copy() -> None:
    method, source = build(frozen_norm="adapt"), small_net().double()
    norms: list[list[bool]] = []

    def look() -> None:
        copied = list(method.adapted.modules())
        norms.append([m.training for m in copied if isinstance(m, nn.BatchNorm2d)])
        assert not any(m.training for m in copied if not isinstance(m, nn.BatchNorm2d))

    run(method, weight_decay=0.1, look=look)
    assert len(norms) == 2 and all(all(each) for each in norms)
    for name in BLOCKS:
        copied, before = method._frozen(name), source.get_submodule(name).state_dict()
        own = [key for key, m in copied.named_modules() if isinstance(m, nn.BatchNorm2d)]
        for key, value in copied.state_dict().items():
            learns = key.rpartition(".")[0] in own
            assert torch.equal(value, before[key]) != learns, f"{name}.{key}"
    averaged = {id(t) for t in Average(method, 0.9, 10).live}
    kernels = [m.weight for m in method.adapted.modules() if isinstance(m, nn.Conv2d)]
    assert kernels and all(id(kernel) not in averaged for kernel in kernels)
    groups = {group.name: group for group in method.plan(1)[0].groups}
    assert groups["frozen copies, norms"].decay == 0
    method.norm = "eval"
    assert not any(m.training for m in method.train().adapted.modules())


@pytest.mark.parametrize(
    ("stem", "downsample", "units", "still"),
    [
        ("train", "own", [["2"], ["3"], ["4"], ["5"]], []),
        ("train", "merge", [["2"], ["3"], ["4", "5"]], []),
        ("train", "train", [["2"], ["3"], ["5"]], []),
        ("routed", "own", [["0", "1"], ["2"], ["3"], ["4"], ["5"]], []),
        ("frozen", "own", [["2"], ["3"], ["4"], ["5"]], ["0", "1"]),
    ],
)
def test_what_a_choice_is_about(stem: str, downsample: str, units: list[list[str]], still: list[str]) -> None:
    method = build(stem=stem, downsample=downsample)
    assert method.units == units
    learning = {id(p) for group in method.plan(1)[0].groups for p in group.params}
    here = {n.split(".")[0] for n, p in method.net.named_parameters() if id(p) not in learning}
    assert sorted(here) == still


def test_tokens_are_still_where_the_stem_is() -> None:
    import timm

    for stem, learns in (("train", True), ("frozen", False), ("routed", False)):
        net = timm.create_model("test_vit", num_classes=5, img_size=32)
        method = SpotTune(net, 3, example=torch.zeros(1, 3, 32, 32), stem=stem)  # type: ignore[arg-type]
        learning = {id(p) for group in method.plan(1)[0].groups for p in group.params}
        assert (id(net.pos_embed) in learning) == (id(net.cls_token) in learning) == learns


# ---------------------------------------------------------------- predicting


def test_predicting_takes_the_preferred_way_and_divides_the_batch() -> None:
    method = perturb(build()).eval()
    x, _ = batches(1, size=16)[0]
    z = method.policy(x).view(len(x), -1, 2)
    taken = z.argmax(-1).bool()
    assert 0 < taken.sum() < taken.numel()
    seen: Counter[str] = Counter()
    for name in BLOCKS:
        method.net.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: seen.update({f"{name} all": 1})
        )
        for label, side in (("tuned", method.net), ("frozen", method.source.net)):
            first = next(m for m in side.get_submodule(name).modules() if isinstance(m, nn.Conv2d))
            first.register_forward_pre_hook(
                lambda _, given, at=f"{name} {label}": seen.update({at: len(given[0])})
            )
    with torch.no_grad():
        said = method.predict(x)
        h = method.net[1](method.net[0](x))
        for i, name in enumerate(BLOCKS):
            assert seen[f"{name} tuned"] == int(taken[:, i].sum())
            assert seen[f"{name} frozen"] == len(x) - int(taken[:, i].sum())
            ours, theirs = (side.get_submodule(name)(h) for side in (method.net, method.source.net))
            h = torch.where(taken[:, i, None, None, None], ours, theirs)
        expected = method.net[8](h.mean((2, 3)))
    torch.testing.assert_close(said, expected, rtol=1e-12, atol=1e-12)


def test_a_batch_is_not_divided_where_statistics_are_of_the_batch() -> None:
    method = perturb(build(frozen_norm="adapt")).train()
    x, _ = batches(1)[0]
    sizes: list[int] = []
    for name in BLOCKS:
        first = next(m for m in method._frozen(name).modules() if isinstance(m, nn.Conv2d))
        first.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    with torch.no_grad():
        method.predict(x)
    assert sizes == [len(x)] * len(BLOCKS)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    method = perturb(build()).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        alone = torch.cat([method.predict(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(method.predict(x), alone, rtol=1e-12, atol=1e-12)


def test_routes_may_be_drawn_when_predicting() -> None:
    method = perturb(build(eval_routing="sample"), by=0.3).eval()
    x, _ = batches(1)[0]
    with torch.no_grad():
        torch.manual_seed(0)
        first = method.predict(x)
        assert not torch.equal(method.predict(x), first)
        torch.manual_seed(0)
        assert torch.equal(method.predict(x), first)


@pytest.mark.parametrize("side", ["tuned", "frozen"])
def test_what_is_no_number_stays_where_no_picture_goes(side: str) -> None:
    method = perturb(build(), by=0.1)
    choose(method, float(side == "frozen"))
    for name in BLOCKS:
        poisoned = method.net.get_submodule(name) if side == "tuned" else method._frozen(name)
        with torch.no_grad():
            for module in poisoned.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.fill_(float("nan"))
    x, y = batches(1)[0]
    for mode in (True, False):
        method.train(mode)
        assert method(x, y).total.isfinite()
        assert method.predict(x).isfinite().all()


# ---------------------------------------------------------------- what is left


@pytest.mark.parametrize("ways", [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_static_export_is_the_routed_network_with_one_way(ways: list[float]) -> None:
    method = build()
    choose(method, torch.tensor(ways, dtype=torch.float64))
    run(method)
    net = method.export(static=True)
    x, _ = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(net(x), method.predict(x))
    assert type(net) is nn.Sequential
    assert list(net.state_dict()) == list(method.net.state_dict())
    frozen = small_net().double().state_dict()
    for name, tuned in zip(BLOCKS, ways, strict=True):
        for key, value in net.get_submodule(name).state_dict().items():
            expected = method.net.state_dict() if tuned else frozen
            assert torch.equal(value, expected[f"{name}.{key}"])
    static = method.diagnostics()["static"]
    assert static["kept"] == [name for name, tuned in zip(BLOCKS, ways, strict=True) if tuned]
    assert static["agreement"] == 1


def test_agreement_of_the_static_network_is_counted() -> None:
    method = perturb(build(), by=0.5)
    (train_x, train_y), (val_x, val_y) = batches(2, size=16)
    for phase in method.phases(1, [(train_x, train_y)], [(val_x, val_y)]):
        assert phase.epochs == 1
    with torch.no_grad():
        same = method.predict(val_x).argmax(1) == method.export(static=True)(val_x).argmax(1)
    assert method.diagnostics()["static"] == {
        "kept": method.diagnostics()["static"]["kept"],
        "agreement": round(same.double().mean().item(), 4),
        "pictures": 16,
        "of": "validation",
    }


@pytest.mark.parametrize("frozen_norm", ["eval", "adapt"])
def test_a_static_network_may_be_asked_for_from_the_start(frozen_norm: str) -> None:
    """Then it is what is scored and shipped: `predict` is the export to the bit, and ordinary."""
    ends = []
    for inference in ("routed", "static"):
        method = perturb(build(inference=inference, frozen_norm=frozen_norm), by=0.5)
        method.routes = lambda x: (x[:, 0, 0, :4] > 0).double()  # tells pictures apart
        run(method)
        ends.append(method)
    routed, static = ends
    x, _ = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(static.predict(x), routed.export(static=True)(x))
        assert torch.equal(static.predict(x), static.export()(x))
        assert not torch.equal(static.predict(x), routed.predict(x))
    assert type(static.export()) is nn.Sequential
    assert static.diagnostics()["static"] == routed.diagnostics()["static"]
    again = build(inference="static", frozen_norm=frozen_norm)
    again.load_state_dict(static.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval().predict(x), static.predict(x))


def test_the_global_form_ends_as_an_ordinary_network() -> None:
    method = build(routing="global", k=2, settle=0.5, frozen_norm="adapt")
    data = batches(3)
    plan = method.plan(4)
    assert [(phase.name, phase.epochs) for phase in plan] == [("choose", 2), ("settle", 2)]
    for phase in method.phases(4, data):
        optimizer = phase.optimizer(torch.optim.SGD, lr=0.05, weight_decay=0.1)
        if phase.name == "settle":
            kept = method.diagnostics()["kept"]
            likely = method.diagnostics()["likely"]
            assert sorted(likely, key=lambda name: -likely[name])[:2] == sorted(
                kept, key=lambda name: -likely[name]
            )
            before = copy.deepcopy(method.state_dict())
            used = {id(p) for p in method.parameters() if p.requires_grad}
        for x, y in data:
            method(x, y).total.backward()
            if phase.name == "settle":  # what DDP waits for
                assert {id(p) for p in method.parameters() if p.grad is not None} == used
            optimizer.step()
            optimizer.zero_grad()
    moved = {
        key.split(".")[1]
        for key, value in method.state_dict().items()
        if key.startswith("net.") and not torch.equal(value, before[key])
    }
    assert moved == {"0", "1", "8", *kept}
    policy = [key for key in before if key.startswith("policy.")]
    assert all(torch.equal(before[key], method.state_dict()[key]) for key in policy)
    net, x = method.export(), data[0][0]
    assert type(net) is nn.Sequential
    with torch.no_grad():
        assert torch.equal(net(x), method.predict(x))
        assert torch.equal(net(x), method.export(static=True)(x))


def test_the_shares_by_which_blocks_are_kept_are_without_noise() -> None:
    method = build(routing="global", k=1, settle=0.5)
    data = batches(2)
    for _ in method.phases(2, data):
        pass
    with torch.no_grad():
        z = torch.cat([method.policy(x) for x, _ in data]).view(-1, 4, 2)
    torch.testing.assert_close(method.memory["likely"], z.softmax(-1)[..., 1].mean(0))


# ---------------------------------------------------------------- seeing the routes


def test_what_there_is_to_see_of_the_routes() -> None:
    method = perturb(build(), by=0.3)
    data = batches(3, size=8)
    assert method.observe() == {}
    for phase in method.phases(1, data):
        method(*data[0])
        assert phase.name == "fine-tune"
    with torch.no_grad():
        z = torch.cat([method.policy(x) for x, _ in data]).view(-1, 4, 2)
    taken, labels = z.argmax(-1), torch.cat([y for _, y in data])
    shown = method.diagnostics()
    v = taken.double().mean(0).tolist()
    assert shown["blocks"] == BLOCKS
    assert shown["tuned"] == pytest.approx(dict(zip(BLOCKS, v, strict=True)), abs=1e-4)
    bits = [-sum(p * math.log2(p) for p in (share, 1 - share) if p > 0) for share in v]
    assert list(shown["bits"].values()) == pytest.approx(bits, abs=1e-4)
    for label in range(3):
        assert shown["by_class"][label] == pytest.approx(taken[labels == label].double().mean(0).tolist())
    sums = taken.sum(1).tolist()
    assert [each["tuned"] for each in shown["pictures"]["most"]] == sorted(sums)[::-1][:5]
    assert [each["tuned"] for each in shown["pictures"]["fewest"]] == sorted(sums)[:5]
    assert all(sums[each["picture"]] == each["tuned"] for each in shown["pictures"]["most"])


class Epochs(list[Any]):
    epoch = 0


def test_the_routes_are_those_of_the_epoch_that_is_kept() -> None:
    """The best weights are put back before anybody looks at the routes."""
    method = build(small_net(), policy_lr=10.0)
    data = Epochs(batches(3, dtype=torch.float32))
    recipe = Recipe(optimizer="sgd", lr=0.2, weight_decay=0.0, label_smoothing=0.0)
    machine = Machine("cpu")
    fitted = fit(
        method,
        train=data,
        val=batches(1, seed=5, dtype=torch.float32),
        plain=data,
        recipe=recipe,
        epochs=4,
        machine=machine,
        keep="best",
    )
    losses = [record["val_log_loss"] for record in fitted.history]
    assert fitted.kept == f"best, epoch {losses.index(min(losses)) + 1}"
    assert min(losses) < losses[-1], "the last one must not be the best"
    with torch.no_grad():
        routes = torch.cat([method.choices(x) for x, _ in data])
    assert torch.equal(method.memory["routes"], routes.to(torch.uint8))
    assert "static" in method.export().meta["routed"]


def test_running_shares() -> None:
    """v after two batches of shares a and b with ρ = 0.9: (0.9 · 0.1 a + 0.1 b) / (1 - 0.81)."""
    method = build().train()
    shares = []
    for seed in range(2):
        torch.manual_seed(seed)
        ways = torch.randint(0, 2, (8, 4)).double()
        choose(method, ways)
        method(*batches(1)[0])
        shares.append(ways.mean(0))
    expected = (0.09 * shares[0] + 0.1 * shares[1]) / 0.19
    seen = torch.tensor(list(method.observe()["tuned"].values()), dtype=torch.float64)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)
    method.eval()
    before = method.observe()
    method(*batches(1)[0])
    assert method.observe() == before


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_collapse_is_said_once(value: float) -> None:
    method = build(policy_lr=0.0).train()
    choose(method, value)
    x, y = batches(1, size=50)[0]
    for _ in range(3):
        method(x, y)
    method.observe()  # too early to tell
    for _ in range(2):
        method(x, y)
    with pytest.warns(UserWarning, match="sends nearly all pictures the same way"):
        method.observe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.observe()


def test_one_way_for_all_is_said_at_the_end_too() -> None:
    """While training, routes are drawn: a policy that never looks at the picture shows without noise only."""
    method = build()
    with torch.no_grad():
        for parameter in method.policy.parameters():
            parameter.zero_()
        method.policy[-1].bias[1::2] = 0.3  # every block is tuned in 57 of 100 draws
    data = batches(7)
    with pytest.warns(UserWarning, match="sends nearly all pictures the same way"):
        for _ in method.phases(1, data):
            for x, y in data:
                method(x, y)
            method.observe()
    assert method.diagnostics()["collapsed"] is True
    assert all(0.2 < share < 0.9 for share in method.observe()["tuned"].values())


# ---------------------------------------------------------------- two halves of a batch


def test_given_the_routes_two_halves_average_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the contract cannot see, because routes are drawn: the objective is a mean over pictures."""
    method = perturb(build())
    method.norm = "eval"
    method.train()
    x, y = batches(1)[0]
    noise = spottune.gumbel_noise((8, 4))
    grads = []
    for parts in ([slice(0, 8)], [slice(0, 8, 2), slice(1, 8, 2)]):
        method.zero_grad()
        for part in parts:
            monkeypatch.setattr(spottune, "gumbel_noise", lambda *_, rows=noise[part], **__: rows)
            (method(x[part], y[part]).total / len(parts)).backward()
        grads.append([p.grad.clone() for p in method.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


# ---------------------------------------------------------------- bad input


def test_mixed_pictures_are_refused() -> None:
    x, y = batches(1)[0]
    shares = torch.eye(3)[y].double()
    method = build()
    assert method(x, shares).total.isfinite()
    with pytest.raises(MethodError, match="train without mixup and cutmix"):
        method(x, 0.7 * shares + 0.3 * shares.flip(0))


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(MethodError, match="k = 5: Sequential has 4 blocks to choose among"):
        build(routing="global", k=5)
    assert build(routing="picture", k=5).units  # where k plays no part


def test_too_few_blocks() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), Block(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    with pytest.raises(MethodError, match="only one block, '1'; two or more are needed"):
        build(net)
    reason = SpotTune.fits(net, {"classes": 3, "train": 9, "val": 3, "img_size": SIZE})
    assert reason == "Sequential has only one block, '1'; two or more are needed."
    assert SpotTune.fits(small_net(), {"classes": 3, "train": 9, "val": 3, "img_size": SIZE}) is None


def test_copies_of_other_shapes() -> None:
    other = small_net()
    other[3] = nn.Identity()
    with pytest.raises(MethodError, match="The source's '3' has other shapes than the network's"):
        build(source=other)


def test_no_example() -> None:
    with pytest.raises(MethodError, match="give example="):
        SpotTune(small_net(), 3)


# ---------------------------------------------------------------- the rest


def test_preset() -> None:
    hyper = registry.configure(SpotTune, "decathlon-official", {})
    assert hyper["frozen_norm"] == "adapt" and hyper["stem"] == "train" and hyper["tau"] == 5
    assert hyper["eval_routing"] == "sample" and hyper["policy_lr"] == 0.1
    rates = {g.name.split(",")[0]: g.lr for g in build(**hyper | {"policy_width": 4}).plan(1)[0].groups}
    assert rates == {"body": 1.0, "head": 1.0, "frozen copies": 1.0, "policy": 0.1}
    recipe = SpotTune.presets["decathlon-official"].recipe
    assert (recipe["lr"], recipe["batch_size"], recipe["nesterov"]) == (0.1, 128, False)


@pytest.mark.parametrize(
    "hyper",
    [{"routing": "global", "k": 2}, {"frozen_norm": "adapt", "stem": "routed", "downsample": "merge"}],
    ids=["global", "adapt"],
)
def test_contract_of_the_other_forms(hyper: dict[str, Any]) -> None:
    checks = [
        "frozen_means_frozen",
        "what_learns_changes",
        "source_stays_as_it_was",
        "resumes_bit_equal",
        "keeps_its_type",
        "export_says_what_predict_says",
        "export_is_plain",
        "predicts_each_picture_alone",
        "shows_plain_data",
    ]
    normed = networks()["BatchNorm (test_resnet)"]  # the form as it comes is tried on the others as well
    assert set(check_method(SpotTune, make_net=normed, hyper=hyper, only=checks).values()) == {"holds"}


def test_a_bundle_holds_the_routes(tmp_path: Path) -> None:
    from headstart.nets.zoo import load
    from headstart.ship import bundle

    torch.manual_seed(0)
    found = load("test_resnet", pretrained=False, img_size=32)
    method = perturb(SpotTune(copy.deepcopy(found.net), 3, example=torch.zeros(1, 3, 32, 32))).eval()
    exported = method.export()
    given = {"config": found.config, "preprocess": found.preprocess, "classes": ["a", "b", "c"]}
    bundle.save(tmp_path / "model", exported, **given, card={"method": "spottune"})
    net = bundle.read(tmp_path / "model").net
    x = torch.randn(6, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(net(x), exported(x))
        assert torch.equal(net(x), method.predict(x))
    bundle.save(tmp_path / "static", method.export(static=True), **given, card={})
    assert bundle.read(tmp_path / "static").config is not None  # timm builds it by name


def test_a_bundle_is_settled_without_the_method(tmp_path: Path) -> None:
    """Whoever has the model folder alone makes the static network of it, and hears what is lost."""
    from headstart.nets.zoo import load
    from headstart.ship import bundle

    torch.manual_seed(0)
    found = load("test_resnet", pretrained=False, img_size=32)
    method = SpotTune(copy.deepcopy(found.net), 3, example=torch.zeros(1, 3, 32, 32), frozen_norm="adapt")
    perturb(method)
    given = {"config": found.config, "preprocess": found.preprocess, "classes": ["a", "b", "c"]}
    bundle.save(tmp_path / "early", method.eval().export(), **given, card={})
    with pytest.raises(ModelError, match="does not say which way most pictures take"):
        bundle.settled(bundle.read(tmp_path / "early"))
    list(method.phases(1, [(torch.randn(12, 3, 32, 32), torch.arange(12) % 3)]))
    bundle.save(tmp_path / "routed", method.export(), **given, card={"method": "spottune", "val": {"n": 3}})
    routed = bundle.read(tmp_path / "routed")
    settled = bundle.settled(routed)
    x = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(settled.net(x), method.export(static=True)(x))
        assert torch.equal(routed.net(x), method.predict(x))
    shown = method.diagnostics()["static"]
    assert settled.card == {
        "method": "spottune",
        "settled": {key: shown[key] for key in ("agreement", "pictures", "of")},
    }
    assert settled.config is not None and settled.config.name == "test_resnet"
    bundle.save(
        tmp_path / "static",
        settled.net,
        config=settled.config,
        preprocess=settled.preprocess,
        classes=settled.classes,
        card=settled.card,
    )
    assert type(bundle.read(tmp_path / "static").net) is type(found.net)
    with pytest.raises(ModelError, match="nothing to settle"):
        bundle.settled(bundle.read(tmp_path / "static"))
    bundle.save(tmp_path / "again", routed.net, **(given | {"config": None}), card={})
    with torch.no_grad():  # what was read can be written, and read
        assert torch.equal(bundle.read(tmp_path / "again").net(x), routed.net(x))


def test_a_case_is_deterministic() -> None:
    """Two runs from one seed end in the same bits; routes come from torch's generator alone."""
    ends = []
    for _ in range(2):
        method = build()
        run(method)
        ends.append(method.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0] if isinstance(ends[0][key], Tensor))


def test_the_contract_case_is_routed() -> None:
    """The contract's own networks send pictures both ways, so that its checks see both copies."""
    case = Case(SpotTune, small_net())
    x, _ = case.train[0]
    choices = case.method().choices(x)
    assert 0 < choices.sum() < choices.numel()
