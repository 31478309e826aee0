"""What the report says for a methods section, of comparisons that were really walked through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quick import Quick

from headstart.comparison.runner import compare
from headstart.report.evidence import read
from headstart.report.methods_section import paragraphs

ASKED: dict[str, Any] = {"methods": "full,l2-sp,probe,scratch,spottune", "seeds": 1, "epochs": 2}


def tuning(out: Path, **asked: Any) -> str:
    compare("pictures", out=out, executor=Quick(), **ASKED, **asked)
    return paragraphs(read(out))[1]


def test_what_was_searched_and_tried_is_told(tmp_path: Path) -> None:
    assert tuning(tmp_path / "out", splits=2, trials=3) == (
        "Hyper-parameters were tuned on validation accuracy, with an equal budget for every method, the "
        "baseline included: 3 trials per split. Learning rate and weight decay were searched from 0.1 to 10 "
        "times the recipe's, alike for all methods but probe. The first trial was each method as it is, the "
        "second of l2-sp the method turned off."
    )


@pytest.mark.parametrize("more", [{"trials": 1}, {"trials": 1, "train_sizes": [20, "all"]}])
def test_of_one_trial_nothing_was_turned_off(tmp_path: Path, more: dict[str, Any]) -> None:
    text = tuning(tmp_path / "out", splits=1, **more)
    shared = " per number of labels" if "train_sizes" in more else ""
    assert f"the baseline included: 1 trial{shared}." in text
    assert text.endswith("The first trial was each method as it is.")


def test_what_is_given_by_hand_is_not_searched(tmp_path: Path) -> None:
    text = tuning(tmp_path / "out", splits=1, trials=1, lr=0.02, weight_decay=0.0)
    assert "the baseline included: 1 trial; of scratch there was nothing to tune." in text
    assert "times the recipe's" not in text
