"""What a competent user writes without headstart: a plain PyTorch loop, and Hugging Face's `Trainer`.

Both start from the same weights as headstart, read the same folders, and use the checkpoint's own
normalisation, the same augmentation (random crop of 35 to 100 % of the area, flip) and the same evaluation
transform. Pictures are decoded with Pillow in one worker process every epoch.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from headstart.data.preprocess import Preprocess

_SCORED_AT_ONCE = 64
# Said once per worker about pictures whose transparency `rgb` throws away.
warnings.filterwarnings("ignore", message="Palette images with Transparency")


@dataclass(frozen=True)
class Trained:
    """What came out of one training run."""

    val_accuracy: float
    history: list[dict[str, float]] = field(default_factory=list)  # per epoch
    predict: Callable[[str], np.ndarray] = field(default=lambda side: np.empty(0), repr=False)


def rgb(path: str) -> Image.Image:
    """A picture as RGB the short way, which throws transparency away; the cheapest there is."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def pictures(folder: Path, preprocess: Preprocess, *, train: bool) -> ImageFolder:
    """The pictures of one side, as float32 [3, S, S] and label; classes in the order of their names."""
    mode = InterpolationMode(preprocess.interpolation)
    if train:
        view: list[Any] = [
            v2.RandomResizedCrop(preprocess.size, scale=(0.35, 1.0), interpolation=mode),
            v2.RandomHorizontalFlip(),
        ]
    else:
        side = int(preprocess.size / preprocess.crop_pct)
        view = [v2.Resize(side, interpolation=mode), v2.CenterCrop(preprocess.size)]
    view += [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=preprocess.mean, std=preprocess.std),
    ]
    return ImageFolder(str(folder), transform=v2.Compose(view), loader=rgb)


def headed(net: nn.Module, classes: int, seed: int) -> nn.Module:
    """A copy of the network with a fresh head as timm initialises it."""
    torch.manual_seed(seed)
    net = copy.deepcopy(net)
    net.reset_classifier(classes)
    return net


@torch.inference_mode()
def answers(net: nn.Module, loader: DataLoader) -> tuple[np.ndarray, np.ndarray]:
    """Predicted class and label of every picture, in order."""
    net.eval()
    said, labels = [], []
    for x, y in loader:
        said.append(net(x).argmax(1))
        labels.append(y)
    return torch.cat(said).numpy(), torch.cat(labels).numpy()


def torch_loop(
    source: nn.Module,
    folder: Path,
    preprocess: Preprocess,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    save: Path | None = None,
) -> Trained:
    """Fine-tune everything: SGD with Nesterov momentum, cosine schedule, validation after every epoch.

    Args:
        source: the pretrained network; not changed.
        folder: train, val and test / class / picture.
        preprocess: what the network expects.
        epochs: how long.
        batch_size: pictures per step.
        lr: peak learning rate, the same for body and head.
        seed: of the head, the order and the augmentation.
        save: where the trained weights are written.
    """
    train_set = pictures(folder / "train", preprocess, train=True)
    val_set = pictures(folder / "val", preprocess, train=False)
    net = headed(source, len(train_set.classes), seed)
    train_loader = DataLoader(
        train_set, batch_size=batch_size, shuffle=True, num_workers=1, persistent_workers=True
    )
    val_loader = DataLoader(val_set, batch_size=_SCORED_AT_ONCE, num_workers=1, persistent_workers=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(train_loader))
    history = []
    for _ in range(epochs):
        net.train()
        total = 0.0
        for x, y in train_loader:
            loss = criterion(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() * len(y)
        said, labels = answers(net, val_loader)
        history.append({"loss": total / len(train_set), "val_accuracy": float((said == labels).mean())})
    if save is not None:
        torch.save(net.state_dict(), save)

    def predict(side: str) -> np.ndarray:
        held = pictures(folder / side, preprocess, train=False)
        return answers(net, DataLoader(held, batch_size=_SCORED_AT_ONCE, num_workers=1))[0]

    return Trained(history[-1]["val_accuracy"], history, predict)


class _Rows(Dataset):
    """Pictures under the names that `Trainer` expects."""

    def __init__(self, pairs: ImageFolder) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x, y = self.pairs[index]
        return {"pixel_values": x, "labels": y}


class _Wrapped(nn.Module):
    """A timm network with the interface that `Trainer` expects of a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        logits = self.net(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def hugging_face(
    source: nn.Module,
    folder: Path,
    preprocess: Preprocess,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> Trained:
    """Fine-tune everything with `transformers.Trainer`: its AdamW, its linear schedule, its clipping at 1.

    Args:
        source: the pretrained network; not changed.
        folder: train, val and test / class / picture.
        preprocess: what the network expects.
        epochs: how long.
        batch_size: pictures per step.
        lr: peak learning rate, the same for body and head.
        seed: of the head, the order and the augmentation.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    train_set = pictures(folder / "train", preprocess, train=True)
    val_set = pictures(folder / "val", preprocess, train=False)

    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(
            model=_Wrapped(headed(source, len(train_set.classes), seed)),
            args=TrainingArguments(
                output_dir=out,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=_SCORED_AT_ONCE,
                learning_rate=lr,
                seed=seed,
                eval_strategy="epoch",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                dataloader_num_workers=1,
                dataloader_persistent_workers=True,
                dataloader_pin_memory=False,
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=_Rows(train_set),
            eval_dataset=_Rows(val_set),
            compute_metrics=lambda said: {
                "accuracy": float((said.predictions.argmax(1) == said.label_ids).mean())
            },
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    history = [
        {"val_accuracy": entry["eval_accuracy"]}
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]

    def predict(side: str) -> np.ndarray:
        held = _Rows(pictures(folder / side, preprocess, train=False))
        said: np.ndarray = trainer.predict(held).predictions.argmax(1)
        return said

    return Trained(history[-1]["val_accuracy"], history, predict)
