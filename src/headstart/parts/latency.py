"""How long a network takes for its pictures on this machine's CPU, as somebody who uses it would measure."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn


def latency_ms(net: nn.Module, shape: tuple[int, int, int], *, batch: int = 1, seconds: float = 0.3) -> float:
    """Milliseconds for one batch of pictures [C, H, W] on the CPU: the median of at least five runs.

    Args:
        net: stays where it is; a copy is measured, with as many threads as torch has.
        shape: of a picture.
        batch: pictures at once.
        seconds: how long to go on measuring, after two runs that are not counted.
    """
    twin = copy.deepcopy(net).cpu().to(memory_format=torch.contiguous_format).eval()
    x = torch.zeros(batch, *shape, dtype=next(twin.parameters()).dtype)
    took: list[float] = []
    with torch.inference_mode():
        for _ in range(2):
            twin(x)
        end = time.perf_counter() + seconds
        while len(took) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            twin(x)
            took.append(time.perf_counter() - start)
    return 1000 * sorted(took)[len(took) // 2]
