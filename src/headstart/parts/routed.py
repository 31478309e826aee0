"""A block in two copies, frozen and tuned, of which each picture takes one.

    y_i = tuned(x_i) where I_i = 1,  frozen(x_i) where I_i = 0

In training both copies run on all pictures: the gradient of I_i is ⟨∂/∂y_i, tuned(x_i) - frozen(x_i)⟩, and
BatchNorm normalises by the whole batch. Otherwise each copy runs on its own pictures only, which says the
same wherever no layer looks across the batch, at the price of one copy.

`routed` is a whole network of such blocks as a torch.fx graph: it holds modules of the network's own classes
and of torch's, nothing else, and divides each batch as described.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from headstart.errors import MethodError
from headstart.parts import plain


def blend(
    chosen: Tensor,
    tuned: Callable[..., Tensor],
    frozen: Callable[..., Tensor],
    x: Tensor,
    *more: Any,
    **named: Any,
) -> Tensor:
    """Both copies on the whole batch.

    Args:
        chosen: I, exactly 0 or 1 for each picture [B]; a gradient goes to it.
        tuned: the copy that learns.
        frozen: the other one.
        x: the stream [B, ...].
        more: further arguments of the block, the same for all pictures.
        named: further arguments of the block by name.
    """
    version = None if x.is_inference() else x._version
    theirs = frozen(x, *more, **named)
    if version is not None and x._version != version:
        raise MethodError("A block overwrites what comes in, so its two copies cannot see the same.")
    ours = tuned(x, *more, **named)
    _same_shape(ours, theirs)
    out: Tensor = _Blend.apply(chosen, ours, theirs)
    return out


def partition(
    chosen: Tensor,
    tuned: Callable[..., Tensor],
    frozen: Callable[..., Tensor],
    x: Tensor,
    *more: Any,
    **named: Any,
) -> Tensor:
    """Each copy on its own pictures: says what `blend` says where no layer looks across the batch."""
    taken = chosen.bool()
    if bool(taken.all()):
        return tuned(x, *more, **named)
    if not bool(taken.any()):
        return frozen(x, *more, **named)
    here, there = taken.nonzero().squeeze(1), (~taken).nonzero().squeeze(1)
    ours = tuned(x[here], *more, **named)  # index_select would lose the memory layout
    theirs = frozen(x[there], *more, **named)
    _same_shape(ours[:1], theirs[:1])
    return torch.cat([ours, theirs])[torch.cat([here, there]).argsort()]


def divided(taken: Any, tuned: Callable[[Any], Any], frozen: Callable[[Any], Any], x: Any) -> Any:
    """The same in operations alone, as torch.fx writes them down.

    Each copy sees one picture more than take it: torch.export does not allow for empty batches.

    Args:
        taken: who takes the tuned copy, bool [B].
        tuned: the copy that learns.
        frozen: the other one.
        x: the stream [B, ...].
    """
    sides = ((tuned, taken), (frozen, ~taken))
    both = torch.cat(
        [side(x[functional.pad(torch.nonzero(mine).squeeze(1), (0, 1))]) for side, mine in sides]
    )
    # Where each picture lies in it; computed like this, the length is known to be that of the batch.
    place = torch.where(taken, torch.cumsum(taken, 0) - 1, torch.cumsum(~taken, 0) + torch.sum(taken))
    return both[place]


class _Blend(torch.autograd.Function):
    """torch.where, with the straight-through gradient of the choice.

    A weighted sum would say the same until one copy overflows: nought times infinity is no number.
    """

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, tuned: Tensor, frozen: Tensor) -> Tensor:
        taken = chosen.bool().view(-1, *[1] * (tuned.ndim - 1))
        ctx.save_for_backward(taken, tuned, frozen)
        ctx.chosen = chosen.dtype
        return torch.where(taken, tuned, frozen)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        taken, tuned, frozen = ctx.saved_tensors
        to_chosen = to_tuned = to_frozen = None
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            gain = (gradient * (tuned - frozen)).sum(tuple(range(1, tuned.ndim)), dtype=wide)
            # A copy that overflowed says nothing of which one is better.
            to_chosen = torch.where(gain.isfinite(), gain, torch.zeros_like(gain)).to(ctx.chosen)
        if ctx.needs_input_grad[1]:
            to_tuned = torch.where(taken, gradient, 0)
        if ctx.needs_input_grad[2]:
            to_frozen = torch.where(taken, 0, gradient)
        return to_chosen, to_tuned, to_frozen


def _same_shape(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise MethodError(
            f"The two copies of a block give unequal shapes, {list(ours.shape)} and {list(theirs.shape)}; a "
            "picture can take either only where they are the same."
        )


# ---------------------------------------------------------------------- a whole network of them


def policy_network(channels: int, decisions: int, *, width: int, size: int) -> nn.Module:
    """A small residual network that says for a picture which copies it takes: logits [B, 2 · decisions].

    Three stages of one block each, as wide as `width`, twice and four times as wide, at random weights (He).
    Its norms look at one picture, so that what it says of a picture does not depend on the batch.

    Args:
        channels: of a picture.
        decisions: L.
        width: channels of the first stage, a multiple of 4.
        size: pixels to which a picture is averaged beforehand; 0: as it comes.
    """
    from timm.models.resnet import BasicBlock

    norm: Any = partial(nn.GroupNorm, 4)

    def block(before: int, after: int) -> nn.Module:
        if before == after:
            return BasicBlock(after, after, norm_layer=norm)
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, 2, bias=False), norm(after))
        return BasicBlock(before, after, 2, shortcut, norm_layer=norm)

    net = nn.Sequential(
        nn.AdaptiveAvgPool2d(size) if size else nn.Identity(),
        nn.Conv2d(channels, width, 3, 2, 1, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        block(width, width),
        block(width, 2 * width),
        block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 2 * decisions),
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def preferences(logits: Any) -> Any:
    """By how much each tuned copy is preferred [B, L], from logits [B, 2 · L] as pairs (frozen, tuned)."""
    return logits[:, 1::2] - logits[:, 0::2]


def routed(
    net: nn.Module,
    source: nn.Module,
    policy: nn.Module,
    units: Sequence[Sequence[str]],
    example: Tensor,
    shape: Mapping[str, int],
) -> fx.GraphModule:
    """A network of routed blocks as a torch.fx graph, in eval mode; it shares nothing with what is given.

    What `rebuilt` needs to make it again is in its `meta["routed"]`, as plain data.

    Args:
        net: has the tuned copies, and all that there is once.
        source: has the frozen copies, under the same names.
        policy: makes logits [B, 2 · L] of pictures.
        units: the modules that each decision is about.
        example: pictures [B, C, H, W] of the size that it is made for.
        shape: `width` and `size` of the policy network.

    Raises:
        MethodError: the forward of the network cannot be followed.
    """
    names = [name for unit in units for name in unit]
    made = plain.follow(net, names, example[:1].to(next(net.parameters())))
    graph = made.graph
    tracer = fx.proxy.GraphAppendingTracer(graph)
    made.add_submodule("policy", copy.deepcopy(policy))
    pictures = next(node for node in graph.nodes if node.op == "placeholder")
    first = pictures.next
    with graph.inserting_before(first):
        preferred: Any = preferences(fx.Proxy(graph.call_module("policy", (pictures,)), tracer)) >= 0
        taken = [preferred[:, i] for i in range(len(units))]
    for mine, unit in zip(taken, units, strict=True):
        for name in unit:
            node = plain.called(made, name)
            made.add_submodule(f"source.{name}", copy.deepcopy(source.get_submodule(name)))

            def call(target: str, x: Any, node: fx.Node = node) -> fx.Proxy:
                given = (x.node, *node.args[1:])
                return fx.Proxy(graph.call_module(target, given, dict(node.kwargs)), tracer)

            with graph.inserting_before(node):
                sides = partial(call, name), partial(call, f"source.{name}")
                stream: Any = node.args[0]
                mixed = divided(mine, *sides, fx.Proxy(stream, tracer))
            node.replace_all_uses_with(mixed.node)
            graph.erase_node(node)
    made = plain.finish(made)
    made.meta["routed"] = {
        "input": list(example.shape[1:]),
        "units": [list(unit) for unit in units],
        "policy": dict(shape),
    }
    return made


def settled(made: fx.GraphModule, net: nn.Module) -> nn.Module:
    """The ordinary network in which all pictures go one way, that of `meta["routed"]["static"]`.

    Args:
        made: from `routed`, or `rebuilt`.
        net: a network of the architecture that was routed; its weights are replaced, in place.
    """
    about = made.meta["routed"]
    plain.take(net, made)
    for unit, stays in zip(about["units"], about["static"]["tuned"], strict=True):
        for name in () if int(stays) else unit:
            net.get_submodule(name).load_state_dict(made.get_submodule(f"source.{name}").state_dict())
    return net.eval()


def rebuilt(net: nn.Module, about: Mapping[str, Any]) -> fx.GraphModule:
    """The network that `routed` made, with other weights: for whoever has them in a file.

    Args:
        net: a network of the architecture that was routed.
        about: `meta["routed"]`.
    """
    example, units = torch.zeros(1, *about["input"]), about["units"]
    policy = policy_network(example.shape[1], len(units), **about["policy"])
    return routed(net, net, policy, units, example, about["policy"])
