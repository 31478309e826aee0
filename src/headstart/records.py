"""What was asked (`Run`), what came out (`Result`): plain data, JSON, hashed.

A `Run` is one training run asked for: data, network, method, recipe. Command-line flags, keys of a YAML
file and keyword arguments of `headstart.train` are its fields, under the same names. Fields that are
None are filled in from the network's family (`Recipe`), so that what is stored says both what was asked
and what was done.

A `Result` is what a run left behind; `result.json` in the run's folder is exactly this record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from headstart.errors import ConfigError, unknown

Schedule = Literal["cosine", "step", "constant"]
OptimizerName = Literal["sgd", "adamw"]
Augment = Literal["standard", "no-flip", "trivial", "none"]
Keep = Literal["last", "best"]
Norm = Literal["train", "eval"]
Precision = Literal["fp32", "bf16", "fp16"]

RANDOM = "random"  # what stands in place of a weights file for a network that has learnt nothing yet


class Record(BaseModel):
    """Plain data: unknown keys refused, nothing changed after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def canonical(self) -> str:
        """This record as one line of JSON with sorted keys: equal records give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))


class Recipe(Record):
    """How a network of one family is trained when nothing else was asked: the strong, plain recipe.

    The values per family are in `headstart.nets.recipe`, with their origin.
    """

    optimizer: OptimizerName
    lr: float = Field(gt=0, description="learning rate of the body; a method's groups scale it")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's (Nesterov) momentum; AdamW's beta1")
    nesterov: bool = True
    weight_decay: float = Field(ge=0, description="never applied to norms and biases")
    schedule: Schedule = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, description="share of a phase's steps that warms up")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    clip: float | None = Field(None, gt=0, description="largest gradient norm; None: not clipped")
    ema: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="decay of the running average of the weights; 0: by length, 1 - 10/steps",
    )
    norm: Norm = Field("train", description="BatchNorm statistics while training: of the batch, or kept")


class Run(Record):
    """One training run, as it was asked for."""

    model_config = ConfigDict(allow_inf_nan=False)

    # what to learn from
    data: str = Field(description="a folder of class folders, or a CSV file")
    image_col: str | None = Field(None, description="CSV: the column that holds the picture's path")
    label_col: str | None = Field(None, description="CSV: the column that holds the label")
    split_col: str | None = Field(None, description="CSV: the column that says train, val or test")
    group_col: str | None = Field(None, description="CSV: pictures of one group stay on one side")
    split: tuple[float, float, float] = Field((0.6, 0.2, 0.2), description="shares of train, val and test")
    split_seed: int | None = Field(None, description="seed of the split; None: the run's seed")
    train_size: int | None = Field(
        None, ge=1, description="learn from so many training pictures, the smaller sets inside the larger"
    )
    strict: bool = Field(False, description="stop at the first unreadable picture")
    class_weights: str = Field("none", description="'auto', 'none', or a JSON/YAML file of class: weight")

    # which network
    model: str = Field("efficientnet-lite0", description="a timm name, a local model folder, or the default")
    weights: str | None = Field(
        None, description="a local checkpoint (safetensors or a state dict), or 'random' for none"
    )
    img_size: int | None = Field(None, ge=16, description="pixels; None: the checkpoint's own")
    source: str | None = Field(
        None, description="another pretrained network to learn from, for methods that take one"
    )
    source_weights: str | None = Field(None, description="a local checkpoint of the source")

    # which method
    method: str = "lp-ft"
    preset: str | None = Field(None, description="a named set of the method's hyper-parameters")
    hyper: dict[str, Any] = Field(default_factory=dict, description="the method's hyper-parameters")

    # how to train; None: the recipe of the network's family
    epochs: int = Field(20, ge=1)
    batch_size: int = Field(32, ge=1, description="pictures per optimiser step, over all devices")
    seed: int = Field(0, ge=0)
    optimizer: OptimizerName | None = None
    lr: float | None = Field(None, gt=0)
    momentum: float | None = Field(None, ge=0, lt=1)
    nesterov: bool | None = None
    weight_decay: float | None = Field(None, ge=0)
    schedule: Schedule | None = None
    warmup: float | None = Field(None, ge=0, lt=1)
    label_smoothing: float | None = Field(None, ge=0, lt=1)
    clip: float | None = Field(None, gt=0)
    ema: float | None = Field(None, ge=0, lt=1)
    norm: Norm | None = None
    augment: Augment = "standard"
    mixup: float = Field(0.0, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(0.0, ge=0, description="alpha of cutmix; 0: off")
    grad_accum: int = Field(1, ge=1, description="micro-batches per optimiser step")
    patience: int | None = Field(
        None, ge=1, description="stop after so many epochs without a better val, and keep the best"
    )
    keep: Keep = Field("last", description="weights that are scored and shipped; 'best': best on val")
    precision: Precision = "fp32"
    trial: bool = Field(
        False, description="of a search: scored on val alone, test is never looked at, no model is kept"
    )

    # where to train: these change the time, not what was asked
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, mps")
    workers: int = Field(0, ge=0, description="processes that prepare pictures; 0: the training process")
    channels_last: bool | None = Field(None, description="None: measured in a few steps")
    compile: bool = False

    MACHINE: ClassVar[frozenset[str]] = frozenset({"device", "workers", "channels_last", "compile"})
    LATER: ClassVar[frozenset[str]] = frozenset({"train_size", "trial"})  # count where asked for

    @field_validator("split")
    @classmethod
    def _shares(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if any(share <= 0 for share in value) or abs(sum(value) - 1) > 1e-6:
            raise ValueError("three shares above 0 that add up to 1, such as 0.6 0.2 0.2")
        return value

    @classmethod
    def asked(cls, **fields: Any) -> Run:
        """Build a run from what a person gave; a mistake is a `ConfigError` with the nearest name."""
        for name in fields:
            if name not in cls.model_fields:
                raise ConfigError(unknown("key", name, cls.model_fields))
        try:
            return cls(**fields)
        except ValidationError as error:
            raise ConfigError(sentence(error)) from None

    def key(self, *, data: str, source: str, settled: Mapping[str, Any] | None = None) -> str:
        """The hash that names this run's folder: 12 hexadecimal digits.

        Two runs are the same run when the same things were asked of the same pictures and the same
        source weights, wherever these lie and whatever machine does the work.

        Args:
            data: fingerprint of the pictures, labels and split.
            source: fingerprint of the source weights; of both networks where there are two.
            settled: values that were open in what was asked (a method's defaults, a family's recipe): a
                run under other defaults is another run.
        """
        places = {"data", "weights", "source_weights"}
        asked = self.model_dump(mode="json", exclude=set(self.MACHINE) | places | {"strict"})
        asked |= {} if self.pretrained else {"weights": RANDOM}  # another recipe than for a file of them
        for name in self.LATER:
            if asked[name] == type(self).model_fields[name].default:
                del asked[name]  # runs of before these fields were there keep their names
        text = json.dumps([asked, data, source, settled], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def pretrained(self) -> bool:
        """Whether the network that learns starts from weights that somebody trained."""
        return self.weights != RANDOM

    def filled(self, values: Mapping[str, Any]) -> Run:
        """This run with values, such as a preset's, in the fields that nobody asked for."""
        open_ = {name for name in values if name not in self.model_fields_set or getattr(self, name) is None}
        return self.model_copy(update={name: values[name] for name in open_})

    def recipe(self, family: Recipe) -> Recipe:
        """The family's recipe with everything that was asked for put in its place."""
        asked = {name: getattr(self, name) for name in Recipe.model_fields if getattr(self, name) is not None}
        return family.model_copy(update=asked)


class Score(Record):
    """How well predictions agree with the labels of one split."""

    n: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float | None = Field(
        None, description="expected calibration error in 15 bins; None in results of older versions"
    )


class PhaseTime(Record):
    """What one phase of a plan took."""

    name: str
    epochs: int
    seconds: float


class Fingerprints(Record):
    """SHA-256 of what a run stood on."""

    source: str = Field(description="the network's weights as they were given")
    other: str | None = Field(None, description="those of the other network that was learnt from")
    data: str = Field(description="the pictures, their labels and their split")


class Parameters(Record):
    """How many numbers learn, and how many leave the house."""

    trained: int
    shipped: int


class Refit(Record):
    """The last step of a run, where it was asked for: trained once more, on train and val together."""

    epochs: int = Field(description="the length that was learnt on train and val apart")
    pictures: int = Field(description="that it learnt from")
    test: Score | None = Field(None, description="of the weights that are shipped")
    seconds: float = 0.0

    def said(self) -> str:
        """Which weights these are, for people."""
        return f"refitted on train and val ({self.pictures} pictures) for {self.epochs} epochs"


class Result(Record):
    """What came out of one run; `result.json` holds it."""

    status: Literal["finished", "failed", "interrupted", "pruned"]
    reason: str | None = Field(None, description="why it did not finish, in one or two lines")
    run: Run
    method: str
    preset: str | None = None
    hyper: dict[str, Any] = Field(
        default_factory=dict, description="every hyper-parameter, defaults included"
    )
    model: str
    recipe: Recipe | None = None
    classes: list[str] = Field(default_factory=list)
    fingerprints: Fingerprints | None = None
    split_seed: int
    seed: int
    epochs: int
    phases: list[PhaseTime] = Field(default_factory=list)
    seconds: float = Field(0.0, description="wall clock of preparing, training and scoring")
    val: Score | None = None
    test: Score | None = None
    kept: str | None = Field(
        None, description="which weights were scored and shipped: 'last' or 'best, epoch 7'"
    )
    parameters: Parameters | None = None
    peak_memory_mb: float | None = Field(
        None, description="MiB: allocated on the GPU; on the CPU of the whole process, libraries included"
    )
    ms_per_image: float | None = None
    flops: int | None = Field(
        None, description="of the shipped network for one picture; a multiplication and an addition are two"
    )
    n_train: int | None = Field(None, description="pictures that were trained on")
    device: str | None = Field(None, description="what it was trained on: 'NVIDIA H100', 'cpu, 2 threads'")
    refit: Refit | None = Field(
        None, description="what is shipped in place of the weights that were scored; None: these are shipped"
    )
    diagnostics: dict[str, Any] = Field(default_factory=dict, description="plain data the method left")
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a `result.json`."""
        # Not pydantic's own reader: it refuses the escapes of file names that are no UTF-8.
        return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))


def sentence(error: ValidationError) -> str:
    """The first mistakes of a pydantic error as one or two plain lines."""
    lines = []
    for item in error.errors()[:2]:
        where = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{where}: {message[0].lower()}{message[1:]}. Got {item['input']!r}.")
    return "\n".join(lines)
