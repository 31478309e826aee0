"""Looking ahead along the steps that SGD would make, and back: what some choices did to where they lead.

    g_t = ∇L_t(θ_t; c) + ωθ_t      v_{t+1} = μv_t + g_t      θ_{t+1} = θ_t − αv_{t+1}      t = 0 … T
    J(c) = L(θ_{T+1})

ω is the weight decay and α the rate; with Nesterov's momentum θ moves by α(g_t + μv_{t+1}). Weights that a
loss does not reach have a zero gradient there: momentum and decay go on, in the steps and on the way back.
dJ/dc is exact, second derivatives included. On the way back, with a = dJ/dθ_{t+1}, and b = dJ/dv_{t+1} as far
as it does not go by θ_{t+1}, for t = T … 0:

    s = b − αa                q = s                X = ⟨∇L_t(θ_t; c), q⟩ with q held
    (Nesterov: s = b − αμa,   q = s − αa)
    dJ/dc += dX/dc            a ← a + ωq + dX/dθ_t               b ← μs

so that the steps themselves need no graph. A step costs its gradient with a graph, and then the way back
through that graph; for t = 0 only as far as c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Optimizer

from headstart.errors import MethodError
from headstart.parts.optimizers import Several
from headstart.parts.ranks import alone, average

Tensors = list[Tensor]
Objective = Callable[[Tensors], Tensor]  # weights to a loss []


class Rates(NamedTuple):
    """What one of SGD's steps does with a weight."""

    lr: float
    decay: float
    momentum: float
    nesterov: bool


class Path:
    """The steps that an optimiser would make from where it stands, without making them.

    Args:
        optimizers: torch's SGD, and whatever moves other weights beside it.
        weights: that SGD moves.

    Raises:
        MethodError: another optimiser moves the weights, or none.
    """

    def __init__(self, optimizers: Sequence[Optimizer], weights: Sequence[nn.Parameter]) -> None:
        found: dict[int, tuple[Rates, Tensor | None]] = {}
        for each in optimizers:
            for group in each.param_groups:
                rates = _rates(group) if type(each) is SGD else None
                for weight in group["params"]:
                    if rates is not None:
                        found[id(weight)] = (rates, each.state[weight].get("momentum_buffer"))
        strange = [weight for weight in weights if id(weight) not in found]
        if strange:
            its = [each for each in optimizers if any(strange[0] is w for w in _moved(each))]
            name = type(its[0]).__name__ if its else "no optimiser"
            raise MethodError(f"Looking ahead follows the steps of SGD, not of {name}. Use --optimizer sgd.")
        self.weights: Tensors = [weight.detach() for weight in weights]
        velocities = [found[id(weight)][1] for weight in weights]
        self.velocities: Tensors = [
            torch.zeros_like(weight) if velocity is None else velocity
            for weight, velocity in zip(self.weights, velocities, strict=True)
        ]
        alike: dict[Rates, list[int]] = {}
        for i, weight in enumerate(weights):
            alike.setdefault(found[id(weight)][0], []).append(i)
        self._alike = alike

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Go on by one step, with the optimiser's own arithmetic; earlier weights stay as they were."""
        weights, velocities = list(self.weights), list(self.velocities)
        for rates, at in self._alike.items():
            g, w, v = (_taken(each, at) for each in (gradients, weights, velocities))
            if rates.decay:
                g = list(torch._foreach_add(g, w, alpha=rates.decay))
            v = list(torch._foreach_add(torch._foreach_mul(v, rates.momentum), g))
            by = torch._foreach_add(g, v, alpha=rates.momentum) if rates.nesterov else v
            _put(velocities, at, v)
            _put(weights, at, torch._foreach_add(w, by, alpha=-rates.lr))
        self.weights, self.velocities = weights, velocities

    def back(self, a: Tensors, b: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """One step of the way back: q, a + ωq and μs, from a and b."""
        q, beside, b = list(a), list(a), list(b)
        for rates, at in self._alike.items():
            a_, b_ = _taken(a, at), _taken(b, at)
            s = torch._foreach_add(b_, a_, alpha=-rates.lr * (rates.momentum if rates.nesterov else 1.0))
            q_ = torch._foreach_add(s, a_, alpha=-rates.lr) if rates.nesterov else s
            _put(q, at, q_)
            _put(beside, at, torch._foreach_add(a_, q_, alpha=rates.decay))
            _put(b, at, torch._foreach_mul(s, rates.momentum))
        return q, beside, b


class Outcome(NamedTuple):
    """Where the steps lead."""

    value: Tensor  # []  J
    gradients: Tensors  # dJ/dc


def look_ahead(
    path: Path,
    losses: Sequence[Objective],
    last: Objective,
    choices: Sequence[Tensor],
    *,
    replay: bool = False,
) -> Outcome:
    """Walk a path of virtual steps and tell what the choices did to where it ends.

    In several processes gradients are averaged over them at every step, so that all walk the same path: that
    of their joined batch. What comes back is each one's own share of dJ/dc; their mean is the gradient.

    Args:
        path: from where, and how; it is walked to its end.
        losses: L_0 ... L_T, functions of the weights and of the choices.
        last: L, a function of the weights.
        choices: c, leaves that require a gradient.
        replay: hold the graph of the last step only, and run the others again on the way back, with the same
            random numbers. Saves memory, costs T gradients.
    """
    steps: list[tuple[Tensors, Tensors, list[Tensor]]] = []
    for t, loss in enumerate(losses):
        leaves = _leaves(path.weights)
        drawn = _random_state(leaves[0])
        again = replay and t < len(losses) - 1
        gradients = _gradients(loss, leaves, graph=not again)
        steps.append((leaves, [] if again else gradients, drawn))
        path.step(averaged([each.detach() for each in gradients]))
    leaves = _leaves(path.weights)
    value = last(leaves)
    a = averaged(derivative([value], leaves))
    b = [torch.zeros_like(each) for each in a]
    total = [torch.zeros_like(each) for each in choices]
    while steps:
        leaves, gradients, drawn = steps.pop()
        if not gradients:
            with _drawing(drawn, leaves[0]):
                gradients = _gradients(losses[len(steps)], leaves, graph=True)
        q, a, b = path.back(a, b)
        wanted = [*choices, *leaves] if steps else list(choices)
        found = derivative(gradients, wanted, q)
        del gradients
        total = torch._foreach_add(total, found[: len(choices)])  # type: ignore[assignment]
        if steps:
            a = list(torch._foreach_add(a, averaged(found[len(choices) :])))
    return Outcome(value.detach(), list(total))


def said_with(
    values: Sequence[Tensor], module: nn.Module, *given: Any, leave_trace: bool = False, **options: Any
) -> Any:
    """What a module says with other values in the place of all its weights that learn.

    Args:
        values: one per parameter that requires a gradient, in the module's order.
        module: it keeps its own.
        given: to its forward.
        leave_trace: buffers, such as running statistics, may change; else they stay as they are.
        options: to its forward, by name.
    """
    names = [name for name, each in module.named_parameters() if each.requires_grad]
    buffers = {} if leave_trace else {name: each.clone() for name, each in module.named_buffers()}
    return functional_call(module, dict(zip(names, values, strict=True)) | buffers, given, options)


class _Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, n: int, *tensors: Tensor) -> Tensor:
        ctx.n = n
        ctx.save_for_backward(*tensors[n:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        planted = torch._foreach_mul(list(ctx.saved_tensors), grad)
        return (grad, None, *planted, *([None] * ctx.n))


def planted(value: Tensor, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """A scalar of this value whose gradient for the weights is known already.

    Being part of the graph it goes through accumulation and averaging over processes like any other term. The
    value's own graph, if it has one, gets its gradient too.
    """
    made: Tensor = _Planted.apply(value, len(weights), *weights, *gradients)
    return made


def derivative(
    of: Sequence[Tensor], to: Sequence[Tensor], along: Sequence[Tensor] | None = None, *, graph: bool = False
) -> Tensors:
    """What ⟨of, along⟩ changes by with each of `to`: zero where nothing leads there.

    Args:
        of: results.
        to: what they were computed from.
        along: one per result, of its shape; None: ones.
        graph: the derivative is to be differentiated in turn.
    """
    directions = [torch.ones_like(each) for each in of] if along is None else along
    pairs = [(each, d) for each, d in zip(of, directions, strict=True) if each.requires_grad]
    if not pairs or not to:
        return [torch.zeros_like(each) for each in to]
    # Not under autocast: it would take the products of the way back in half precision.
    with torch.autocast(to[0].device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.grad(
            [each for each, _ in pairs], to, [d for _, d in pairs], create_graph=graph, allow_unused=True
        )
    return [torch.zeros_like(t) if g is None else g for t, g in zip(to, found, strict=True)]


def averaged(tensors: Tensors) -> Tensors:
    """The means over all processes; in a single one, the tensors themselves."""
    if alone():
        return tensors
    flat = average(torch.cat([each.reshape(-1) for each in tensors]))
    pieces = torch.split(flat, [each.numel() for each in tensors])
    return [piece.view(each.shape) for piece, each in zip(pieces, tensors, strict=True)]


def norm(tensors: Tensors) -> Tensor:
    """The length of many tensors as one vector: []."""
    length: Tensor = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(tensors))))
    return length


def apart(optimizer: Optimizer) -> list[Optimizer]:
    """The optimisers that step as this one."""
    return list(optimizer.optimizers) if isinstance(optimizer, Several) else [optimizer]


def _moved(optimizer: Optimizer) -> Tensors:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _rates(group: dict[str, Any]) -> Rates:
    if group["dampening"] or group["maximize"]:
        raise MethodError("Looking ahead follows SGD without dampening and maximize. Leave them out.")
    return Rates(float(group["lr"]), group["weight_decay"], group["momentum"], group["nesterov"])


def _taken(tensors: Sequence[Tensor], at: list[int]) -> Tensors:
    return [tensors[i] for i in at]


def _put(tensors: Tensors, at: list[int], values: Sequence[Tensor]) -> None:
    for i, value in zip(at, values, strict=True):
        tensors[i] = value


def _leaves(tensors: Tensors) -> Tensors:
    return [each.detach().requires_grad_() for each in tensors]


def _gradients(loss: Objective, leaves: Tensors, *, graph: bool) -> Tensors:
    # The fast kernels of attention cannot be differentiated twice.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return derivative([loss(leaves)], leaves, graph=graph)


def _random_state(like: Tensor) -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state(like.device)] if like.is_cuda else []
    return [torch.get_rng_state(), *on_gpu]


@contextmanager
def _drawing(state: list[Tensor], like: Tensor) -> Iterator[None]:
    """Inside, random numbers are those that followed upon this state; outside nothing is drawn."""
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.set_rng_state(state[0])
        if like.is_cuda:
            torch.cuda.set_rng_state(state[1], like.device)
        yield
