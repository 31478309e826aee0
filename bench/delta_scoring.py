"""Claim: scoring DELTA's channels takes a quarter of the naive way's arithmetic, and a third of its time.

Scored are the 3,840 channels of resnet50 that DELTA looks at, on 128 pictures: the loss without a channel
minus the loss with all. The naive way, the official code's, sets one filter to zero and runs the whole
network, 3,840 times for every batch of 32. headstart's (`headstart.parts.ablation`) runs what lies before
the layer once, and what follows on copies of its output that are joined to one batch.

Counted are multiply-adds, by torch's own counter, on one batch of 16 pictures: exact, and the same share for
any number of pictures and on any machine. Timed are all channels in our way, and `--filters` of each layer in
the naive one, which is as slow for one filter as for another; both on the same pictures, and scaled to the
whole. On a GPU pictures have 224 pixels; on the CPU they have 64, and there are 16 of them, because the naive
way would take hours. That both ways give the same scores is tested in float64 (tests/parts/test_ablation.py);
how far apart they are here, on random weights, is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import measurement
from headstart.parts.ablation import ablation_scores
from headstart.parts.taps import Tap, find_taps
from measurement import Check

SHARE, TIMES = 0.25, 3.0
NET, CLASSES = "resnet50", 10
PICTURES, NAIVE_BATCH, COUNTED = 128, 32, 16


def naive(
    net: nn.Module, taps: Sequence[Tap], x: Tensor, y: Tensor, filters: int | None
) -> dict[str, Tensor]:
    """One filter after the other set to zero, in place, and put back; of each layer the first so many."""
    found = {}
    for tap in taps:
        weight = net.get_submodule(tap.name).get_parameter("weight")
        scores = torch.zeros(filters or tap.channels, device=x.device)
        for pictures, labels in zip(x.split(NAIVE_BATCH), y.split(NAIVE_BATCH), strict=True):
            whole = F.cross_entropy(net(pictures), labels)
            for j in range(len(scores)):
                kept = weight[j].clone()
                weight[j] = 0
                scores[j] += (F.cross_entropy(net(pictures), labels) - whole) * (len(pictures) / len(x))
                weight[j] = kept
        found[tap.name] = scores
    return found


def multiply_adds(run: Callable[[], Any]) -> float:
    """10⁹ of them."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def seconds(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """What a call takes, and what it gives."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, found


def main() -> int:
    parser = measurement.arguments(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="pixels; else 224 on a GPU, 64 on the CPU")
    parser.add_argument("--pictures", type=int, help="that are timed; else 128 on a GPU, 16 on the CPU")
    parser.add_argument(
        "--filters", type=int, default=12, help="of each layer that the naive way is timed on"
    )
    options = parser.parse_args()
    here = measurement.begin("delta_scoring")
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    size = options.size or (224 if gpu else 64)
    pictures, counted = options.pictures or (PICTURES if gpu else COUNTED), COUNTED
    architecture, filters = NET, options.filters
    if options.quick:
        architecture, size, pictures, counted, filters = "resnet18", 32, 2, 2, 1
    torch.manual_seed(0)
    net = timm.create_model(architecture, num_classes=CLASSES, zero_init_last=False)
    net = net.eval().requires_grad_(False).to(device)
    x = torch.randn(pictures, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    y = (torch.arange(pictures) % CLASSES).to(device)
    taps = find_taps(net, x[:1])
    channels = sum(tap.channels for tap in taps)
    few = x[:counted], y[:counted]

    with torch.no_grad():
        forward = multiply_adds(lambda: net(few[0]))
        ours = multiply_adds(lambda: ablation_scores(net, taps, *few, F.cross_entropy))
        share = ours / (forward * (channels + len(taps)))
        print(f"  {channels} channels of {architecture}, {size} px: {share:.1%} of the naive multiply-adds")
        naive(net, taps, *few, 1)  # warm
        slow, some = seconds(device, lambda: naive(net, taps, x, y, filters))
        fast, found = seconds(device, lambda: ablation_scores(net, taps, x, y, F.cross_entropy))
    # The naive way's forwards with all channels are in both, and do not grow with the filters.
    forwards = len(taps) * (filters + 1)
    slow *= (channels + len(taps)) / forwards
    apart = max(float((found[tap.name][:filters] - some[tap.name]).abs().max()) for tap in taps)
    span = max(float(each.abs().max()) for each in found.values())
    print(
        f"  all {channels} on {pictures} pictures: {fast:.1f} s, the naive way {slow:.1f} s (from {forwards})"
    )
    checks = [
        Check("multiply-adds / naive", share, SHARE, at_least=False),
        Check("naive time / time", slow / fast, TIMES, at_least=True),
    ]
    details = {
        "channels": channels,
        "pixels": size,
        "pictures_timed": pictures,
        "pictures_counted": counted,
        "gmacs_per_picture": {
            "ours": round(ours / counted, 1),
            "naive": round(forward / counted * channels, 1),
        },
        "seconds": {"ours": round(fast, 2), "naive": round(slow, 2), "naive_forwards_timed": forwards},
        "largest_difference": {"of": round(span, 6), "apart": round(apart, 9)},
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
    }
    if gpu:
        details["peak_memory_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return measurement.finish(
        "delta_scoring",
        "Scoring DELTA's channels takes a quarter of the naive way's arithmetic, and a third of its time.",
        here,
        checks,
        details,
        quick=options.quick,
    )


if __name__ == "__main__":
    raise SystemExit(main())
