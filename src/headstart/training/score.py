"""What a method says about pictures, and how well that agrees with their labels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from sklearn.metrics import f1_score, log_loss, recall_score
from torch import Tensor

from headstart import calibration
from headstart.errors import TrainingError
from headstart.method import Method
from headstart.records import Score


@torch.inference_mode()
def predictions(
    method: Method, batches: Iterable[tuple[Tensor, Tensor]], *, after: str = "training"
) -> tuple[np.ndarray, np.ndarray] | None:
    """Class probabilities [N, K] as float32 and labels [N], in the order of the batches; None without any.

    Args:
        method: is put into eval mode.
        batches: pictures and labels.
        after: where in training this is, for people.

    Raises:
        TrainingError: a probability that is not a number; the loss can't show what the last step did.
    """
    method.eval()
    probabilities, labels = [], []
    for x, y in batches:
        probabilities.append(method.predict(x).float().softmax(1).cpu())
        labels.append(y.cpu())
    if not labels:
        return None
    every = torch.cat(probabilities)
    if not every.isfinite().all():
        raise TrainingError(
            f"The network's answers are no numbers any more after {after}. Try a lower --lr, or --clip 1; "
            "the checkpoint of the epoch before it stays."
        )
    return every.numpy(), torch.cat(labels).numpy()


def score(probabilities: np.ndarray, labels: np.ndarray) -> Score:
    """Accuracy, balanced accuracy, macro-F1, log-loss and calibration error.

    Args:
        probabilities: [N, K], rows add up to 1.
        labels: [N]. Classes without a picture do not enter the averages over classes.
    """
    said = probabilities.argmax(1)
    present = np.unique(labels)
    exact = probabilities.astype(np.float64)
    exact /= exact.sum(1, keepdims=True)
    recalls = recall_score(labels, said, labels=present, average=None, zero_division=0)
    return Score(
        n=len(labels),
        accuracy=float((said == labels).mean()),
        balanced_accuracy=float(recalls.mean()),
        macro_f1=float(f1_score(labels, said, labels=present, average="macro", zero_division=0)),
        log_loss=float(log_loss(labels, exact, labels=np.arange(probabilities.shape[1]))),
        calibration_error=calibration.bins(exact, labels).error,
    )
