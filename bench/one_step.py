"""One training step of a method, as the benchmarks of steps time it, and what its graph holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from headstart.method import Method
from headstart.nets.recipe import recipe
from headstart.training.machine import Machine


def ready(
    method: Method, what: str, machine: Machine, x: torch.Tensor, *, classes: int, pictures: int, batch: int
) -> Callable[[], None]:
    """One training step, ready to be called; `what` names it where its loss is no number."""
    chosen = recipe(method.net, train_size=pictures, batch_size=batch)
    method.criterion = torch.nn.CrossEntropyLoss(label_smoothing=chosen.label_smoothing)
    machine.place(method)
    y = torch.arange(len(x)) % classes
    phase = next(iter(method.phases(1, [(x, y)])))
    optimizer = machine.optimizer(phase, chosen)
    for group in optimizer.param_groups:
        group["lr"] *= 1e-3  # random weights on random pictures: keep every number finite
    trained = machine.wrap(method)

    def step() -> None:
        loss = machine.step(trained, optimizer, x, y, clip=chosen.clip)
        if not loss.total.isfinite():
            raise RuntimeError(f"The loss of {what} is {float(loss.total)}.")

    return step


def kept_for_backward(method: Method, x: torch.Tensor, *, classes: int) -> float:
    """MiB that the graph of one step holds, weights left out."""
    method.train()
    weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
    if method.keeps_source:
        weights |= {p.untyped_storage().data_ptr() for _, p in method.source.named_parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method(x, torch.arange(len(x)) % classes)
    assert loss.total.requires_grad  # the graph is alive, so no storage was used twice
    return sum(held.values()) / 2**20
