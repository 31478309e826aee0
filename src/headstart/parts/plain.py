"""A network's forward as a graph that can be rewritten, and left behind as a module of torch alone.

`follow` writes a forward down with torch.fx, and calls whatever lies beside the modules of interest as it is.
What a method makes of the graph is a `torch.fx.GraphModule`: plain code over modules of torch and of the
network, that can be copied, moved, cast and read (`print(net.code)`). No file can name its class, so what is
needed to make it again stands in its `meta["routed"]` as plain data, and is kept beside the weights.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from headstart.errors import MethodError
from headstart.parts.forward import Tracer


def follow(net: nn.Module, modules: Iterable[str], example: Tensor) -> fx.GraphModule:
    """A copy of a network, in eval mode, whose forward is a graph that calls the given modules by name.

    Args:
        net: the network; it stays as it is.
        modules: dotted names of the modules that must be nodes of the graph. What contains none of them is
            one node as well.
        example: pictures [1, C, H, W]; where the forward asks for a number, it gets that of the example.

    Raises:
        MethodError: torch.fx cannot follow the forward.
    """
    root = copy.deepcopy(net).eval()
    names = list(modules)
    try:
        with torch.no_grad():
            graph = Tracer(names, torch.cat([example, example])).trace(root, concrete_args=_defaults(root))
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MethodError(
            f"The forward of {type(net).__name__} cannot be followed by torch.fx, so nothing plain could be "
            f"exported: {lines[0]}"
        ) from error
    made = fx.GraphModule(root, graph, class_name=type(net).__name__)
    # Checks, also that nobody sets the forward's options, and these options themselves.
    checks = (torch._assert, fx._symbolic_trace._assert_is_none)
    for node in [node for node in graph.nodes if node.target in checks]:
        graph.erase_node(node)
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        if not node.users:
            graph.erase_node(node)
    made.recompile()
    return made.eval()


def called(made: fx.GraphModule, module: str) -> fx.Node:
    """The one node that calls a module.

    Raises:
        MethodError: it is called never, or more than once.
    """
    nodes: list[fx.Node] = [
        node for node in made.graph.nodes if node.op == "call_module" and node.target == module
    ]
    if len(nodes) != 1:
        raise MethodError(f"The forward calls '{module}' {len(nodes)} times; once is needed.")
    return nodes[0]


def finish(made: fx.GraphModule) -> fx.GraphModule:
    """Check and compile a graph that was rewritten, and let go of the modules it no longer calls."""
    made.graph.lint()
    made.delete_all_unused_submodules()
    made.recompile()
    return made.requires_grad_(True).eval()


def take(net: nn.Module, made: fx.GraphModule) -> None:
    """Put the weights of a graph that was made of a network into another one of its architecture.

    What the forward never asked for is not in the graph, and stays.
    """
    wanted, held = net.state_dict(), made.state_dict()
    net.load_state_dict({name: value for name, value in held.items() if name in wanted}, strict=False)


def _defaults(net: nn.Module) -> dict[str, Any] | None:
    options = list(inspect.signature(net.forward).parameters.values())[1:]
    return {each.name: each.default for each in options if each.default is not each.empty} or None
