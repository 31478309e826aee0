"""L2-SP: decay the weights towards where they started, not towards zero.

    J(w) + Ω(Δ) + β/2 · ‖w_S̄‖²        Δ = w_S − w⁰_S

    variant        Ω
    l2-sp          α/2 · ‖Δ‖²
    l2-sp-fisher   α/2 · Σ_j F_j Δ_j²
    l1-sp          α · ‖Δ‖₁
    gl-sp          α · Σ_g √p_g · ‖Δ_g‖
    gl-sp-fisher   α · Σ_g √p_g · (Σ_{j∈g} F_j Δ_j²)^½
    l2             α/2 · ‖w_S‖², the baseline

S are the weights shared with the source network, S̄ those of the new head, w⁰ the source's values, F the
diagonal of the source's Fisher information (`headstart.parts.fisher`), g the p_g numbers that go into one
output channel. All sums are over elements, with no division by the number of weights, layers or pictures.
The penalties take the place of weight decay. They need one more copy of the weights, with F two.

Paper: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional
Networks", ICML 2018, arXiv 1802.01483.
Official code: holyseven/TransferLearningClassification (TensorFlow 1, MIT), modes 0, 1, 4, 5, 6, 61, 7.

Differs from the paper:
- which weights: the formula speaks of all shared weights; the official code's scripts penalise kernels
  only, no biases and no BatchNorm scales. `params="kernels"` (default) follows the code, `params="all"`
  the formula.
- α and β are two rates, as in the official code; an earlier text of the paper multiplies the head's by α.
- α has no single published value. 0.01 is the code's default; its script for a target that is close to
  the source (Stanford Dogs) uses 0.1. The pull of one step is rate × α, so α cannot be read without it,
  and a value that suits one variant does not suit another.
- groups: the code has them for convolutions; here a linear layer's are its rows, and with `params="all"`
  each bias or scale is a group of its own. The code adds 1e-16 under the root, so its gl-sp does not start
  at 0; here value and gradient are exactly 0 at the start, with no smoothing.
- Fisher information: the authors published two files, made on the source's data, and not how they made
  them. Here it is estimated, from target pictures through the source's own head unless `fisher` names a
  file that was made from source pictures; its mean is scaled to 1 and its largest values are cut, or one α
  would mean something else for every network (`normalise=False, fisher_max=None` leaves it as it is).
- `step`: the paper's penalties are part of the loss ("coupled"). The decoupled and proximal steps are ours.
- the optimiser, the schedule and the rates are the run's, as for every other method; preset `paper`
  restores the paper's.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer

from headstart.errors import MethodError
from headstart.method import Data, Loss, Method, Phase, Preset, Room
from headstart.parts.fisher import Fisher, estimate, load
from headstart.parts.kernels import is_kernel
from headstart.parts.pairs import distances, paired
from headstart.parts.pull import Form, Pull
from headstart.parts.space import Between

Variant = Literal["l2", "l2-sp", "l2-sp-fisher", "l1-sp", "gl-sp", "gl-sp-fisher"]

_FORMS: dict[str, Form] = {
    "l2": "squares",
    "l2-sp": "squares",
    "l2-sp-fisher": "squares",
    "l1-sp": "absolute",
    "gl-sp": "groups",
    "gl-sp-fisher": "groups",
}
_STEPS = {
    "coupled": list(_FORMS),
    "decoupled": ["l2", "l2-sp", "l2-sp-fisher"],
    "proximal": ["l1-sp", "gl-sp"],
}

_RECIPE = {  # what the paper's code and TLlib share
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.9,
    "schedule": "step",
    "warmup": 0.0,
    "label_smoothing": 0.0,
    "norm": "train",
}
_AS_IT_IS = {"normalise": False, "fisher_max": None, "fisher_eps": 0.0}


class L2SP(Method):
    """Fine-tune with a pull towards the source weights.

    Args:
        alpha: α, strength of the pull on the weights shared with the source. 0.01: default of the official
            code (Dogs script: 0.1; for variant l2 1e-4).
        beta: β, strength of the decay of the new head. 0.01: the paper found it best throughout (the Dogs
            script for variant l2: 1e-3).
        variant: the form of the pull: "l2-sp" (squares), "l1-sp" (absolute values), "gl-sp" (norms of output
            channels), with "-fisher" weighed by F; "l2" is plain decay, the baseline. "l2-sp": the authors'
            advice.
        params: which weights are pulled: "kernels" (two or more dimensions, no learned tokens; the official
            code) or "all" (also norms, biases and tokens; the paper's formula, and TLlib).
        step: "coupled" (the paper): the penalties are in the loss, and their gradient goes through momentum
            and Adam's scaling. Otherwise they are in no loss, and after each step of the optimiser weights
            move by their group's rate η: "decoupled" (for AdamW; l2 forms) w ← w − ηα F (w − w⁰), "proximal"
            (l1-sp, gl-sp) the minimiser of Ω near w, which puts weights exactly on w⁰; in both the head
            decays by w ← w − ηβ w.
        fisher: a file made by `headstart fisher` from this very network. None estimates from the training
            pictures before training.
        normalise: scale F to a mean of 1, so that α means about as much as without F. True: ours.
        fisher_max: F is cut from above here (mode 61 of the official code), after normalising. 100: ours; a
            few weights have thousands of times the mean, and would diverge. None: not cut.
        fisher_eps: added to F (mode 6 of the official code), after cutting. 0: the code's default.
        body_lr: rate of the body, × the run's. 1.
        head_lr: rate of the head, × the run's. 10, as for `full`, so that the two differ by the penalty only.
    """

    name = "l2-sp"
    room: ClassVar[Room] = "constrain"
    paper = "Li, Grandvalet, Davoine, ICML 2018, arXiv 1802.01483"
    keeps_source = True
    presets = {  # noqa: RUF012
        "paper": Preset(
            "ICML 2018 and its code: SGD 0.9 without Nesterov, one rate of 0.01, ÷10 at two thirds, batch 64",
            hyper={"alpha": 0.01, "beta": 0.01, "params": "kernels", "body_lr": 1.0, "head_lr": 1.0}
            | _AS_IT_IS,
            recipe=_RECIPE | {"nesterov": False, "batch_size": 64},
        ),
        "tllib": Preset(
            "Transfer-Learning-Library's script: all weights, body at a tenth of the rate, batch 48",
            hyper={"alpha": 0.01, "beta": 0.01, "params": "all", "body_lr": 0.1, "head_lr": 1.0},
            recipe=_RECIPE | {"nesterov": True, "batch_size": 48},
        ),
    }

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        alpha: Annotated[NonNegativeFloat, Between(1e-4, 1.0, log=True, off=0.0)] = 0.01,
        beta: NonNegativeFloat = 0.01,
        variant: Variant = "l2-sp",
        params: Literal["kernels", "all"] = "kernels",
        step: Literal["coupled", "decoupled", "proximal"] = "coupled",
        fisher: str | None = None,
        normalise: bool = True,
        fisher_max: PositiveFloat | None = 100.0,
        fisher_eps: NonNegativeFloat = 0.0,
        body_lr: NonNegativeFloat = 1.0,
        head_lr: NonNegativeFloat = 10.0,
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)
        self.variant, self.step = variant, step
        self.body_lr, self.head_lr = body_lr, head_lr
        self._weighs = variant.endswith("fisher")
        self._adjust = normalise, fisher_max, fisher_eps
        if variant not in _STEPS[step]:
            raise MethodError(
                f"l2-sp: variant '{variant}' has no {step} step. These have: {', '.join(_STEPS[step])}."
            )
        if fisher is not None and not self._weighs:
            raise MethodError(f"l2-sp: variant '{variant}' uses no Fisher information; leave out fisher.")
        wanted = is_kernel if params == "kernels" else lambda name, weight: True
        every = paired(self.net, self.source.net, None if classes is None else self.head_module)
        shared = [pair for pair in every.shared if wanted(pair.name, pair.weight)]
        new = [weight for name, weight in every.new if wanted(name, weight)]
        unmatched = [name for name, weight in every.unmatched if wanted(name, weight)]
        if not shared:
            raise MethodError(
                "l2-sp found no weight that the network shares with its source by name and shape."
            )
        if unmatched:
            warnings.warn(
                f"l2-sp: the source has no weight of this name and shape, so these decay like a new head: "
                f"{', '.join(unmatched[:5])}{' ...' if len(unmatched) > 5 else ''}.",
                stacklevel=2,
            )
        self._every, self._names = every.shared, [pair.name for pair in shared]
        self._start = [pair.start for pair in shared]  # w⁰
        anchors = [] if variant == "l2" else self._start
        self._shared = Pull(_FORMS[variant], alpha, [pair.weight for pair in shared], anchors)  # on S
        self._new = Pull("squares", beta, new)  # on S̄
        self._provenance: dict[str, Any] | None = None
        if fisher is not None:
            known = load(Path(fisher).expanduser(), source=self.source.fingerprint)
            self._remember(known)
            self._provenance = known.provenance

    def objective(self, x: Tensor, y: Tensor) -> Loss:
        """Task loss, the pull to the source and the decay of the head."""
        logits = self.net(x)
        return self.loss(logits, y, **self.terms(x, y, logits))

    def terms(self, x: Tensor, y: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The penalties; none where they have a step of their own."""
        if self.step != "coupled":
            return {}
        return {"shared": self._shared.term(self._roots()), "new": self._new.term()}

    def plan(self, epochs: int) -> list[Phase]:
        """Everything learns at once, after the Fisher information where it has to be estimated."""
        groups = self.groups(body_lr=self.body_lr, decay=0.0, head_lr=self.head_lr)
        tune = Phase("fine-tune", epochs, groups, self.objective, bind=self._bind)
        if not self._weighs or self._provenance is not None:
            return [tune]
        return [Phase("estimate Fisher", 0, [], self.objective, enter=self._estimate), tune]

    def _estimate(self, data: Data) -> None:
        seed = torch.initial_seed() % 2**31  # the run's; nobody else's random numbers are drawn
        found = estimate(self.source.net, data.plain, seed=seed, view=self.source.view)
        self._remember(found)
        self.memory["estimated"] = torch.tensor([found.pictures, found.samples, found.seed])

    def _remember(self, found: Fisher) -> None:
        normalise, most, eps = self._adjust
        roots = found.roots(self.source.net, self._start, normalise=normalise, most=most, eps=eps)
        for name, root in zip(self._names, roots, strict=True):
            self.memory[_key(name)] = root

    def _roots(self) -> list[Tensor]:
        """√F of the shared weights; none for 1."""
        if not self._weighs:
            return []
        if _key(self._names[0]) in self.memory:
            return [self.memory[_key(name)] for name in self._names]
        if all(torch.equal(w, start) for w, start in zip(self._shared.weights, self._start, strict=True)):
            return []  # nothing is pulled yet, whatever F is
        raise MethodError(
            "l2-sp: the Fisher information is not estimated yet. Train through phases(), or give fisher=FILE."
        )

    def _bind(self, optimizer: Optimizer) -> None:
        in_loss = self.step == "coupled"
        self._shared.check(optimizer, in_loss=in_loss, roots=self._roots())
        self._new.check(optimizer, in_loss=in_loss)
        if not in_loss:
            optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._shared.follow(optimizer, self._roots())
        self._new.follow(optimizer)

    def observe(self) -> dict[str, Any]:
        """How far the weights that the source has too are from it, by layer."""
        return {"distance": distances(self._every)}

    def diagnostics(self) -> dict[str, Any]:
        """How many numbers are pulled, decayed and left alone; where the Fisher information is from."""
        shown: dict[str, Any] = {"membership": self.membership()}
        if self._provenance is not None:
            shown["fisher"] = self._provenance
        elif "estimated" in self.memory:
            pictures, samples, seed = self.memory["estimated"].tolist()
            shown["fisher"] = {
                "inputs": "training pictures, through the source's head",
                "pictures": pictures,
                "samples": samples,
                "seed": seed,
                "source": self.source.fingerprint,
            }
        return shown

    def membership(self) -> dict[str, int]:
        """How many numbers are pulled to the source, decayed as new, and left alone."""
        shared, new = (sum(w.numel() for w in each.weights) for each in (self._shared, self._new))
        free = sum(each.numel() for each in self.net.parameters()) - shared - new
        return {"shared": shared, "new": new, "free": free}


def _key(name: str) -> str:
    return f"fisher {name}".replace(".", "/")  # the memory's names have no dots
