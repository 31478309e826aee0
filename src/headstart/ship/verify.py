"""Proof that an exported file says what the trained network says, on pictures that it did not learn from.

Each form opens and prepares the pictures by what lies in its own folder. The labels must agree on all of
them; how far the probabilities are apart is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from headstart.data.picture import Unreadable, open_picture
from headstart.errors import DataError, ModelError
from headstart.ship.calibration import Calibration

# Gives the logits [K] of an opened picture.
Says = Callable[[Image.Image], np.ndarray]

ENOUGH = 50  # pictures; fewer are noted


class Disagreement(ModelError):
    """A form that gives a picture another label than the trained network."""


def verify(
    trained: Says,
    forms: Mapping[str, Says],
    pictures: Sequence[Path],
    classes: Sequence[str],
    calibration: Calibration,
) -> dict[str, dict[str, Any]]:
    """Compare forms of a network with the network itself.

    Args:
        trained: the network as it left training.
        forms: what it became, by name.
        pictures: that it did not learn from; those that cannot be opened are left out.
        classes: names of the outputs.
        calibration: of its probabilities.

    Returns:
        By form: pictures compared, labels that agree, largest difference of a probability and of a logit,
        and the picture of the former.

    Raises:
        Disagreement: naming the form, the picture and both labels.
        DataError: not one picture can be opened.
    """
    found = {name: _Difference() for name in forms}
    for path in pictures:
        try:
            image = open_picture(path)
        except Unreadable:
            continue
        expected = trained(image)
        for name, form in forms.items():
            said = form(image)
            mine, theirs = int(expected.argmax()), int(said.argmax())
            if mine != theirs:
                gap = float(expected[mine] - expected[theirs])
                raise Disagreement(
                    f"The {name} form does not say what the trained network says: of '{path}' it says "
                    f"'{classes[theirs]}', the network '{classes[mine]}' (by {gap:.2g} in the logit). "
                    "Nothing was exported."
                )
            found[name].add(path, expected, said, calibration)
    if pictures and not any(each.pictures for each in found.values()) and forms:
        raise DataError(f"None of the {len(pictures)} pictures to verify with can be opened.")
    return {name: each.to_dict() for name, each in found.items()}


class _Difference:
    """How far two forms of a network are apart, over pictures."""

    def __init__(self) -> None:
        self.pictures = 0
        self.probability = self.logit = 0.0
        self.where: str | None = None

    def add(self, path: Path, expected: np.ndarray, said: np.ndarray, calibration: Calibration) -> None:
        mine, theirs = calibration.probabilities(np.stack([expected, said]))
        probability = float(np.abs(mine - theirs).max())
        self.pictures += 1
        self.logit = max(self.logit, float(np.abs(expected - said).max()))
        if self.where is None or probability > self.probability:
            self.probability, self.where = probability, path.name

    def to_dict(self) -> dict[str, Any]:
        return {
            "pictures": self.pictures,
            "agreed": self.pictures,
            "largest_difference": self.probability,
            "largest_logit_difference": self.logit,
            "on": self.where,
        }
