"""DELTA: keep what the layers say about the pictures near to what they said at the source.

    J(w) + α · 1/B Σ_i Ω(x_i) + β/2 · ‖w_head‖²

    attention      Ω(x) = ½ Σ_l C_l/P_l Σ_c W_lc ‖FM_lc(w, x) − FM_lc(w⁰, x)‖²
    plain          Ω(x) = ½ Σ_l Σ_c ‖FM_lc(w, x) − FM_lc(w⁰, x)‖²

FM_lc is channel c, of C_l, of the map of layer l, which has P_l = height · width positions: the raw output of
the last convolution of each stage, before its norm, the sum and the ReLU (`headstart.parts.taps`). w_head is
the weight and the bias of the new head. W_l weighs the channels by what the source loses without them:

    1. a new head is trained on a copy of the source, whose other weights stay;
    2. δ_lc = loss with channel c of layer l set to 0, minus loss, on some training pictures;
    3. W_l = softmax(z/T),  z = (δ_l − mean) / std.

A training step takes 1.34 plain ones' multiply-adds in a ResNet50, and (2) takes 18.5 % of what one forward
for every channel would (bench/delta_step.py, bench/delta_scoring.py). In memory are the source's weights, and
a step on 32 pictures of 128 px keeps 60 MiB of maps for its backward pass, 7 % more than a plain one keeps.

Paper: Li, Xiong, et al., "DELTA: DEep Learning Transfer using Feature Map with Attention for
Convolutional Networks", ICLR 2019, arXiv 1901.09229.
Official code: lixingjian/DELTA (PyTorch; it has no licence, so facts were taken from it and no text).

Differs from the paper:
- its text was not at hand; the formulas are those of the official code. Whether the paper has the ½,
  C/P, the z-score and T could not be checked.
- the sum over the pictures is divided by their number, so that α means the same for any batch and beside a
  mean task loss: 0.64 is the code's 0.01 at its batch of 64. reduction="sum" is the code's form.
- the source is evaluated with its own BatchNorm statistics while the network normalises by the batch, as in
  the code, so that Ω is not 0 at the start; source_bn="match" makes it 0.
- networks other than ResNets: what is tapped there is our analogue. Tokens count as positions.
- channels are scored on copies joined to batches that start behind the layer, which gives the same numbers
  for less than a fifth of the work in a ResNet; a bias goes with its channel. The task loss is the run's,
  label smoothing and class weights included.
- the pictures on which head and scores are found come from the run's loader, which while a phase is entered
  shows the same augmentation every time it is walked.
- the time for both is not taken from the epochs asked for. It counts in the run's time.
- the optimiser, the schedule and the rates are the run's, as for every other method.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from headstart.errors import MethodError
from headstart.method import Batch, Data, Loss, Method, Phase, Preset, Room
from headstart.parts.ablation import ablation_scores
from headstart.parts.blank import blank
from headstart.parts.gap import gap
from headstart.parts.head import find_head, replace_head
from headstart.parts.head_only import learn_head
from headstart.parts.pull import Pull
from headstart.parts.space import Between
from headstart.parts.statistics import batch_statistics, uses_batch
from headstart.parts.taps import NoStages, Tap, find_taps, watching

# How the official code trains the head of step 1.
_HEAD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "gamma": 0.1 ** (1 / 6)}

_RECIPE = {  # what the official code and TLlib share
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "schedule": "step",
    "warmup": 0.0,
    "label_smoothing": 0.0,
    "norm": "train",
}


class DELTA(Method):
    """Fine-tune with a pull of the feature maps towards the source's.

    Args:
        alpha: α, strength of the pull on the maps. 0.64: the official code's 0.01, which multiplies a sum
            over 64 pictures (Dogs script: 6.4). Without attention the same α pulls P times as hard.
        beta: β, strength of the decay of the head. 0.01: official code.
        attention: weigh the channels; without it all count alike, and no head or scores are needed.
        reduction: "mean" over the pictures, or their "sum" (the official code's form), per micro-batch.
        source_bn: the source's BatchNorm: "eval" (its own statistics; the official code) or "match" (as the
            network has it: by the batch while it learns).
        taps: dotted names of layers to look at, "a,b". Empty: the last convolution of each stage.
        temperature: T; the larger, the more alike the weights. 5: official code.
        n_images: pictures on which channels are scored. 128: official code, 4 batches of 32.
        head_epochs: epochs in which the head for the scores is trained. 10: official code.
        freeze_bn: leave the copy's BatchNorm alone in them; in the official code its statistics move to
            the training pictures. Then they are walked once, and not in every epoch.
        eval_transform: score on pictures without augmentation; the official code takes them as in training.
        clamp_negative: count channels that do harm (δ < 0) as of no use. No: official code.
        source_precision: "same" as the network, or "bf16": faster where the processor has it, less exact.
        body_lr: rate of the body, × the run's. 1.
        head_lr: rate of the head, × the run's. 10, as for `full`: the two differ by the penalties only.
    """

    name = "delta"
    room: ClassVar[Room] = "constrain"
    paper = "Li, Xiong, et al., ICLR 2019, arXiv 1901.09229"
    keeps_source = True
    presets = {  # noqa: RUF012
        "official": Preset(
            "the official code's script: SGD 0.9 without Nesterov, one rate of 0.01, batch 64; its rate "
            "falls smoothly to a tenth over two thirds of the epochs and on, this one ÷10 at two thirds",
            hyper={"alpha": 0.01, "beta": 0.01, "reduction": "sum", "body_lr": 1.0, "head_lr": 1.0},
            recipe=_RECIPE | {"nesterov": False, "batch_size": 64},
        ),
        "tllib": Preset(
            "Transfer-Learning-Library's script: body at a tenth of the rate, batch 48, 320 pictures; "
            "without its tuning of the whole network before the scores",
            hyper={
                "alpha": 0.01,
                "beta": 0.01,
                "reduction": "sum",
                "n_images": 320,
                "body_lr": 0.1,
                "head_lr": 1.0,
            },
            recipe=_RECIPE | {"nesterov": True, "batch_size": 48},
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        alpha: Annotated[NonNegativeFloat, Between(0.02, 20.0, log=True, off=0.0)] = 0.64,
        beta: NonNegativeFloat = 0.01,
        attention: bool = True,
        reduction: Literal["mean", "sum"] = "mean",
        source_bn: Literal["eval", "match"] = "eval",
        taps: str = "",
        temperature: PositiveFloat = 5.0,
        n_images: PositiveInt = 128,
        head_epochs: NonNegativeInt = 10,
        freeze_bn: bool = False,
        eval_transform: bool = False,
        clamp_negative: bool = False,
        source_precision: Literal["same", "bf16"] = "same",
        body_lr: NonNegativeFloat = 1.0,
        head_lr: NonNegativeFloat = 10.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.alpha, self.attention, self.reduction = alpha, attention and alpha > 0, reduction
        self.source_bn, self.source_precision = source_bn, source_precision
        self.temperature, self.n_images, self.clamp_negative = temperature, n_images, clamp_negative
        self.head_epochs, self.freeze_bn, self.eval_transform = head_epochs, freeze_bn, eval_transform
        self.body_lr, self.head_lr = body_lr, head_lr
        self._source_head = self.head if given.get("source") is None else find_head(self.source.net)
        self._fresh = classes is not None
        self._decay = Pull("squares", beta, list(self.head_module.parameters()) if self._fresh else [])
        self.taps = self._find([name.strip() for name in taps.split(",") if name.strip()]) if alpha else []
        self._maps: dict[str, Tensor] = {}  # from `watching` to `terms`, within one objective

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """Task loss, the pull on the maps and the decay of the head."""
        with self.watching():
            logits = self.net(x)
        return self.loss(logits, y, **self.terms(x, y, logits))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the taps say while the network runs inside."""
        with watching(self.net, self.taps) as maps:
            yield
        self._maps = maps

    def terms(self, x: Tensor, y: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """α Ω on what `watching` kept for pictures x [B, C, H, W], and β/2 ‖w_head‖²."""
        maps, self._maps = self._maps, {}
        terms = {"head": self._decay.term()}
        if self.taps:
            terms["maps"] = self._behaviour(maps, self._source_maps(x), len(x))
        return terms

    def plan(self, epochs: int) -> list[Phase]:
        """The channels are weighed on entering (no epochs), then everything learns."""
        groups = self.groups(body_lr=self.body_lr, decay=0.0, head_lr=self.head_lr)
        tune = Phase("fine-tune", epochs, groups, self.objective)
        weigh = Phase("weigh channels", 0, [], self.objective, enter=self._weigh)
        return [weigh, tune] if self.attention else [tune]

    def diagnostics(self) -> dict[str, Any]:
        """What is looked at; and of each layer the scores, the weights and how uneven these are."""
        if "W" not in self.memory:
            return {"taps": [_shown(tap) for tap in self.taps]}
        measured = zip(self.taps, self._split("W"), self._split("deltas"), strict=True)
        return {"taps": [_shown(tap) | _uneven(W, deltas) for tap, W, deltas in measured]}

    @classmethod
    def fits(cls, net: nn.Module, data: Mapping[str, int]) -> str | None:
        """None where the network can be looked at while it runs; layers can be named where none are found."""
        try:
            find_taps(net, blank(net, data["img_size"]))
        except NoStages:
            return None
        except MethodError as error:
            return " ".join(str(error).split())
        return None

    def _find(self, names: list[str]) -> list[Tap]:
        """The taps of the network, which the source has to have too."""
        if self.example is None:
            raise MethodError(
                "delta has to see the network run once: give example=..., a batch [1, C, H, W]."
            )
        taps = find_taps(self.net, self.example, names=names, head=self.head)
        theirs = find_taps(self.source.net, self.source.view(self.example), names=[tap.name for tap in taps])
        for ours, its in zip(taps, theirs, strict=True):
            sizes = [f"{tap.channels} channels of {tap.positions} positions" for tap in (ours, its)]
            if sizes[0] != sizes[1]:
                raise MethodError(
                    f"delta compares maps of one size; at '{ours.name}' the network has {sizes[0]}, its "
                    f"source {sizes[1]}."
                )
        return taps

    def _source_maps(self, x: Tensor) -> dict[str, Tensor]:
        """What the source says at its taps, and nothing after the last of them."""
        net, low = self.source.net, self.source_precision == "bf16"
        by_batch = self.source_bn == "match" and uses_batch(self.net)
        with (
            torch.no_grad(),
            torch.autocast(x.device.type, torch.bfloat16) if low else nullcontext(),
            batch_statistics(net, always=by_batch),
            watching(net, self.taps, stop=True) as maps,
        ):
            net(self.source.view(x))
        return maps

    def _behaviour(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], pictures: int) -> Tensor:
        strength = self.alpha / (pictures if self.reduction == "mean" else 1)
        gaps = []
        for tap, W in zip(self.taps, self._weights(), strict=True):
            one, other = ours[tap.name], theirs[tap.name]
            positions = one[0].numel() // tap.channels  # H·W of these pictures
            rates = strength * W * (tap.channels / positions if self.attention else 1)
            gaps.append(gap(one, other, tap.along(rates, one)))
        return torch.stack(gaps).sum()

    def _weights(self) -> list[Tensor]:
        """W_l [C] of each tap; uniform as long as nothing was measured, and 1 without attention."""
        if self.attention and "W" in self.memory:
            return self._split("W")
        like = next(self.net.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        shares = [1 / tap.channels if self.attention else 1.0 for tap in self.taps]
        return [
            torch.full((tap.channels,), share, device=like.device, dtype=wide)
            for tap, share in zip(self.taps, shares, strict=True)
        ]

    def _weigh(self, data: Data) -> None:
        """Train a head on a copy of the source, and see what its loss is without each channel."""
        net, view = copy.deepcopy(self.source.net), self.source.view
        if self._fresh:
            replace_head(net, self._source_head, len(self.head_module.get_parameter("weight")))
            net.get_submodule(self._source_head).reset_parameters()  # type: ignore[operator]
        with torch.enable_grad(), torch.autocast(next(net.parameters()).device.type, enabled=False):
            learn_head(
                net,
                self._source_head,
                lambda: ((view(x), y) for x, y in data.train),
                self.criterion,
                epochs=self.head_epochs,
                hold_statistics=self.freeze_bn or self.norm == "eval",
                **_HEAD,
            )
        x, y = _first(data.plain if self.eval_transform else data.train, self.n_images)
        scores = ablation_scores(net, self.taps, view(x), y, self.criterion)
        deltas = [scores[tap.name] for tap in self.taps]
        for tap, each in zip(self.taps, deltas, strict=True):
            if not each.isfinite().all():
                raise MethodError(
                    f"delta: the loss without a channel of '{tap.name}' is no number. Look at the weights of "
                    "the source, or leave out the weighing: attention=false."
                )
        self.memory["deltas"] = torch.cat(deltas)
        self.memory["W"] = torch.cat(
            [
                channel_weights(each.clamp(min=0) if self.clamp_negative else each, self.temperature)
                for each in deltas
            ]
        )

    def _split(self, name: str) -> list[Tensor]:
        """What was measured for all taps, tap by tap."""
        sizes = [tap.channels for tap in self.taps]
        if len(self.memory[name]) != sum(sizes):
            raise MethodError(
                f"These channel weights are of other layers: {len(self.memory[name])} channels, and the taps "
                f"have {sum(sizes)}. Start with the taps they were made for."
            )
        return list(torch.split(self.memory[name], sizes))


def channel_weights(delta: Tensor, temperature: float) -> Tensor:
    """W = softmax(z/T) with z = (δ − mean) / std over the channels [C]; uniform where all δ are the same."""
    deviation = delta - delta.mean()
    std = deviation.square().mean().sqrt()  # of the population
    z = deviation / std if std > 0 else torch.zeros_like(delta)
    return (z / temperature).softmax(0)


def _first(batches: Iterable[Batch], n: int) -> Batch:
    """The first n pictures and their labels, or all there are."""
    xs, ys, count = [], [], 0
    for x, y in batches:
        xs.append(x[: n - count])
        ys.append(y[: n - count])
        count += len(xs[-1])
        if count == n:
            break
    if not count:
        raise MethodError("delta: there are no pictures to weigh channels on.")
    return torch.cat(xs), torch.cat(ys)


def _shown(tap: Tap) -> dict[str, Any]:
    return {
        "name": tap.name,
        "channels": tap.channels,
        "positions": tap.positions,
        "stride": tap.stride,
    }


def _uneven(W: Tensor, deltas: Tensor) -> dict[str, Any]:
    """Scores and weights of a tap, and how far the weights are from all being alike, as plain data."""
    scaled = len(W) * W.double()
    return {
        "effective": float(1 / scaled.square().mean()),  # as many channels, all alike, of these
        "CW": {"min": float(scaled.min()), "median": float(scaled.median()), "max": float(scaled.max())},
        "weights": [float(f"{each:.6g}") for each in W.tolist()],
        "deltas": [float(f"{each:.6g}") for each in deltas.tolist()],
    }
