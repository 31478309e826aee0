import time

import pytest

from headstart.nets import embedded
from headstart.nets.listing import models


def test_everything_within_seconds() -> None:
    started = time.perf_counter()
    rows = models()
    assert time.perf_counter() - started < 10
    assert len(rows) > 1000 and len({row.name for row in rows}) == len(rows)
    assert rows[0].name == "efficientnet-lite0" and rows[0].offline
    assert all(row.parameters is None for row in rows), "so many are not counted"


def test_patterns_and_counts() -> None:
    (row,) = models("efficientnet-lite0")
    assert (row.parameters, row.licence, row.input_size, row.offline) == (4_652_008, "apache-2.0", 224, True)
    assert [row.name for row in models("TEST_vit.*")] == ["test_vit.r160_in1k"]
    (vit,) = models("test_vit.*")
    assert vit.parameters is not None and vit.parameters > 100_000
    (uncounted,) = models("test_vit.*", counted=0)
    assert uncounted.parameters is None
    assert {"resnet18.a1_in1k", "resnet18.a2_in1k"} <= {row.name for row in models("resnet18", counted=0)}
    assert models("no such network") == []


def test_without_the_package_the_default_is_not_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "installed", lambda: False)
    assert not models("efficientnet-lite0")[0].offline
