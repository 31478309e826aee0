"""Ray: two machines, one of which is lost; an address at which nobody answers."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from quick import Far, Located, Quick

from headstart.comparison.crew import Here, Task
from headstart.comparison.runner import compare
from headstart.errors import ConfigError, Unreachable
from headstart.records import Result, Run
from headstart.training.events import Reporter

ray = pytest.importorskip("ray", reason="Ray is the extra 'cluster'")

from headstart.comparison import cluster  # noqa: E402

HERE = Path(__file__).parent
ASKED: dict[str, Any] = {"methods": "full,l2-sp", "splits": 1, "seeds": 3, "epochs": 4, "trials": 2}

# Ray leaves sockets and processes to the garbage collector, and warns of its own future.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Two machines of two cores each, as far as Ray can tell."""
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False},
        )
        made.add_node(num_cpus=2, object_store_memory=80_000_000)
        made.wait_for_nodes()
    try:
        yield made
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.shutdown()
            made.shutdown()


@pytest.mark.slow
def test_a_lost_machine_costs_its_runs_alone(machines: Any, tmp_path: Path) -> None:
    compare("pictures", out=tmp_path / "whole", executor=Quick(), **ASKED)
    out, diary = tmp_path / "out", tmp_path / "diary"
    diary.touch()
    other, head = next(iter(machines.worker_nodes)), machines.head_node.node_id

    def lose() -> None:
        until = time.monotonic() + 60
        while not noted(diary, "begins", other.node_id):
            assert time.monotonic() < until
            time.sleep(0.02)
        machines.remove_node(other, allow_graceful=False)

    with ThreadPoolExecutor(1) as beside:
        losing = beside.submit(lose)
        # Two seconds a run, so that the machine is lost in the midst of one.
        there: dict[str, Any] = {"executor": Located(pause=0.5, diary=str(diary)), "jobs": 4}
        found = compare("pictures", out=out, on="ray", address=machines.address, **there, **ASKED)
        losing.result()
    assert found.failed == []
    assert (out / "results.csv").read_text() == (tmp_path / "whole" / "results.csv").read_text()
    machines.wait_for_nodes()  # as many as were not taken away: Ray knows that one is lost
    assert machines.list_all_nodes() == [machines.head_node]
    lost = set(noted(diary, "begins", other.node_id)) - set(noted(diary, "ends", other.node_id))
    assert lost, "no run was under way on the machine that was lost"
    assert lost <= set(noted(diary, "ends", head))
    again = Counter(noted(diary, "begins", head))
    assert set(again.values()) == {1}  # a run that was under way elsewhere was left alone


def noted(diary: Path, what: str, node: str) -> list[str]:
    """The runs that began, or ended, on a machine."""
    lines = [line.split() for line in diary.read_text().splitlines()]
    return [name for begins_or_ends, name, at in lines if (begins_or_ends, at) == (what, node)]


class Rows(Reporter):
    """Keeps which run it was told of, and what came of it."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.rows: list[Result] = []

    def run(self, name: str, index: int, total: int) -> None:
        self.begun.append((index, total))

    def row(self, result: Result) -> None:
        self.rows.append(result)


@pytest.mark.slow
def test_real_runs_on_machines_without_the_files(
    machines: Any, pictures: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Pictures and network go out through the object store, and what is learnt comes home, to the bit."""
    model, picture = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "one.png"
    shutil.copy(pictures / "class_a" / "000.png", picture)
    asked: dict[str, Any] = {"methods": "full", "splits": 1, "seeds": 2, "epochs": 1, "batch_size": 8}
    asked |= {"model": str(model), "device": "cpu", "channels_last": False}
    compare(str(pictures), out=tmp_path / "here", jobs=1, **asked)
    told = Rows()  # one run after the other, and yet none tells what happens as one does here
    there = {"executor": Far(), "on": "ray", "address": machines.address, "jobs": 1, "reporter": told}
    found = compare(str(pictures), out=tmp_path / "there", **there, **asked)
    assert found.failed == []
    assert told.begun == [(1, 2), (2, 2)]
    assert [result.seed for result in told.rows] == [0, 1]
    assert not pictures.exists()
    assert not model.exists()
    runs = sorted(each.name for each in (tmp_path / "here" / "runs").iterdir())
    assert len(runs) == 2
    for name in runs:
        assert same_answers(tmp_path / "here" / "runs" / name, tmp_path / "there" / "runs" / name)
    assert len(found.best.predict(picture)) == 1


def test_an_address_at_which_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(Unreachable, match=f"No Ray cluster answers at 127.0.0.1:{port}") as caught:
        compare("x", "full", out=tmp_path / "out", on="ray", address=f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 15
    assert "ray start --head" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_listens_is_not_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        @staticmethod
        def init(**options: Any) -> None:
            time.sleep(5)

    monkeypatch.setattr(cluster, "JOINED_IN", 0.1)
    with pytest.raises(Unreachable, match="did not take us in"):
        cluster._join(Never, "127.0.0.1:1", {})


@pytest.mark.parametrize("address", ["here", "host:", ":", "host:port", "ray://host"])
def test_what_is_no_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="address is host:port"):
        compare("x", "full", out=tmp_path / "out", on="ray", address=address)


def test_where_else_runs_cannot_be_done(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on is 'ray'"):
        compare("x", "full", out=tmp_path / "out", on="slurm")
    with pytest.raises(ConfigError, match="with --on ray"):
        compare("x", "full", out=tmp_path / "out", address="host:1")


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match="headstart\\[cluster\\]"):
        cluster.connect(None)


def test_what_a_run_asks_of_a_machine() -> None:
    def nodes(*cores: int, gpus: int = 0) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": n, **({"GPU": gpus} if gpus else {})}} for n in cores]

    assert cluster._resources(nodes(8, 16), None, "cpu") == ({"num_cpus": 4}, 6)
    assert cluster._resources(nodes(2, 16), None, "cpu") == ({"num_cpus": 2}, 9)
    assert cluster._resources(nodes(2, 2), 4, "cpu") == ({"num_cpus": 1}, 4)
    assert cluster._resources(nodes(16, gpus=8), None, "auto") == ({"num_gpus": 1, "num_cpus": 2}, 8)
    assert cluster._resources(nodes(16, gpus=8), None, "cpu") == ({"num_cpus": 4}, 4)
    with pytest.raises(Unreachable, match="no machine"):
        cluster._resources([{"Alive": False, "Resources": {"CPU": 8}}], None, "cpu")


def test_pictures_can_be_sent_to_a_machine_without_the_files(pictures: Path, tmp_path: Path) -> None:
    from headstart.data.loader import load
    from headstart.data.transforms import Preprocess

    task = load(Run(data=str(pictures)), Preprocess(size=32), cache=tmp_path / "cache")
    assert task.pictures.where is not None
    sent = pickle.loads(pickle.dumps(task.pictures.in_memory()))
    assert sent.where is None
    index = task.split.index("val")
    assert np.array_equal(sent.plain(index), task.pictures.plain(index))
    assert np.array_equal(sent.large(index[0]), task.pictures.large(index[0]))


@dataclass(frozen=True)
class Parcel:
    packed: bytes


class Post:
    """As much of Ray as a crew knows, in this process: what travels is pickled; who waits does the task."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2}}]

    def put(self, what: Any) -> Parcel:
        return Parcel(pickle.dumps(what))

    def remote(self, function: Callable[..., Any]) -> Any:
        def send(*given: Any) -> Callable[[], Any]:
            sent = [each if isinstance(each, Parcel) else self.put(each) for each in given]
            return lambda: function(*(pickle.loads(each.packed) for each in sent))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=send))

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return refs[:1], refs[1:]

    def get(self, ref: Callable[[], Any]) -> Any:
        return pickle.loads(pickle.dumps(ref()))


def test_the_machine_that_trains_needs_none_of_our_files(
    pictures: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures, network and weights of classes: what was read here is what is learnt from there."""
    from headstart.training.job import execute, prepare

    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = tmp_path / "weights.yaml"
    weights.write_text("class_a: 4.0")
    asked = {"model": str(model), "class_weights": str(weights), "epochs": 1, "batch_size": 8}
    run = Run.asked(data=str(pictures), method="full", device="cpu", channels_last=False, **asked)
    prepared = prepare(run, say=lambda _: None)
    execute(prepared, tmp_path / "here")
    crew = cluster.Cluster(
        Here(), Reporter(), connection=cluster.Connection(Post(), ours=False), jobs=1, device="cpu"
    )
    crew.start(Task(run, prepared.name, tmp_path / "there"), prepared)
    for gone in (pictures, model):
        shutil.rmtree(gone)
    weights.unlink()
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "its cache"))
    ended = crew.next(1.0)
    assert ended is not None
    assert ended.reason is None, ended.trace
    assert same_answers(tmp_path / "here", tmp_path / "there")
    # Places on this machine stay out of what is shipped, also where they cannot be looked up.
    assert str(tmp_path) not in (tmp_path / "there" / "model" / "README.md").read_text()


def same_answers(one: Path, other: Path) -> bool:
    """To the bit."""
    with np.load(one / "predictions.npz") as ours, np.load(other / "predictions.npz") as its:
        return set(ours) == set(its) and all(np.array_equal(ours[name], its[name]) for name in ours)


def test_the_environment_is_told_to_keep_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with pytest.raises(ConfigError):
        cluster.connect("nowhere")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
