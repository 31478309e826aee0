"""Names to methods, and what a person asks of one, checked."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import pytest
from torch import nn

from headstart import registry
from headstart.errors import ConfigError, MethodError
from headstart.method import Method, Preset, Room
from headstart.methods.constrain.l2_sp import L2SP


def test_ours_are_listed() -> None:
    assert {"full", "l2-sp", "lp-ft", "probe", "scratch"} <= set(registry.names())
    assert registry.get("l2-sp") is L2SP


def test_everything_is_in_order_of_rooms_and_names() -> None:
    keys = [(registry.ROOMS.index(cls.room), cls.name) for cls in registry.everything()]
    assert keys == sorted(keys)
    assert len(keys) == len(registry.names())


def test_an_unknown_method_is_told_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"Unknown method 'l2sp'\. Did you mean 'l2-sp'\? List them with"):
        registry.get("l2sp")


class Theirs(Method):
    """Somebody else's.

    Args:
        strength: of it. 1.
        kind: of it. "a".
    """

    name = "theirs"
    room: ClassVar[Room] = "select"
    paper = "none"
    presets: ClassVar[dict[str, Preset]] = {"strong": Preset("made up", hyper={"strength": 5.0})}

    def __init__(
        self,
        net: nn.Module,
        classes: int | None = None,
        *,
        strength: float = 1.0,
        kind: Literal["a", "b"] = "a",
        **given: Any,
    ) -> None:
        super().__init__(net, classes, **given)


class Nameless(Method):
    pass


class NoRoom(Method):
    name = "no-room"
    room = "attic"  # type: ignore[assignment]


NOT_A_METHOD = 3


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that these are installed: name, and what stands after the equals sign."""

    def install(*points: tuple[str, str]) -> None:
        made = [EntryPoint(name, value, registry.GROUP) for name, value in points]
        monkeypatch.setattr(registry, "entry_points", lambda group: made)
        registry._listed.cache_clear()

    yield install
    monkeypatch.undo()
    registry._listed.cache_clear()


def test_a_third_partys_method_is_like_ours(listed: Any) -> None:
    listed(("theirs", f"{__name__}:Theirs"))
    assert registry.names() == ["theirs"]
    assert [cls.name for cls in registry.everything()] == ["theirs"]


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "gone",
            "no_such_module:Thing",
            r"'gone' \(no_such_module:Thing\) cannot be imported: ModuleNotFound",
        ),
        ("gone", f"{__name__}:Absent", "cannot be imported: AttributeError"),
        ("three", f"{__name__}:NOT_A_METHOD", r"is not a subclass of headstart\.Method"),
        ("net", "torch.nn:Linear", r"is not a subclass of headstart\.Method"),
        ("nameless", f"{__name__}:Nameless", "is listed as 'nameless' and calls itself None"),
        ("other", f"{__name__}:Theirs", "is listed as 'other' and calls itself 'theirs'"),
        ("no-room", f"{__name__}:NoRoom", "has room 'attic'. Allowed: baseline, constrain"),
    ],
)
def test_a_method_that_cannot_be_used_is_told_why(listed: Any, name: str, value: str, match: str) -> None:
    listed((name, value))
    with pytest.raises(MethodError, match=match):
        registry.get(name)


def test_a_module_that_raises_anything_at_import(listed: Any, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "breaks_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    listed(("breaks", "breaks_at_import:Thing"))
    with pytest.raises(MethodError, match="cannot be imported: ZeroDivisionError"):
        registry.get("breaks")


def test_two_packages_with_one_name_are_refused(listed: Any) -> None:
    listed(("theirs", f"{__name__}:Theirs"), ("theirs", "another:Theirs"))
    with pytest.raises(MethodError, match="Two installed packages offer a method called 'theirs'"):
        registry.names()


def test_one_package_seen_twice_is_one(listed: Any) -> None:
    listed(("theirs", f"{__name__}:Theirs"), ("theirs", f"{__name__}:Theirs"))
    assert registry.names() == ["theirs"]


# ---------------------------------------------------------------- what is asked of a method


def test_configure_defaults_then_preset_then_given() -> None:
    assert registry.configure(Theirs, None, {}) == {"strength": 1.0, "kind": "a"}
    assert registry.configure(Theirs, "strong", {}) == {"strength": 5.0, "kind": "a"}
    assert registry.configure(Theirs, "strong", {"strength": "2", "kind": "b"}) == {
        "strength": 2.0,
        "kind": "b",
    }


@pytest.mark.parametrize(
    ("preset", "hyper", "match"),
    [
        (None, {"strengt": 1}, r"Unknown hyper-parameter of 'theirs' 'strengt'\. Did you mean 'strength'\?"),
        (
            None,
            {"strength": "much"},
            "theirs: strength = 'much' does not fit: input should be a valid number",
        ),
        (None, {"kind": "c"}, "theirs: kind = 'c' does not fit: input should be 'a' or 'b'"),
        ("stron", {}, r"Unknown preset of 'theirs' 'stron'\. Did you mean 'strong'\?"),
    ],
)
def test_configure_refuses(preset: str | None, hyper: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        registry.configure(Theirs, preset, hyper)


def test_configure_refuses_what_a_bare_method_does_not_have() -> None:
    with pytest.raises(ConfigError, match="has no hyper-parameters; 'a' was given"):
        registry.configure(NoRoom, None, {"a": 1})
    with pytest.raises(ConfigError, match="has no presets"):
        registry.configure(NoRoom, "paper", {})


@pytest.mark.parametrize("cls", registry.everything(), ids=lambda cls: cls.name)
def test_defaults_and_presets_fit_their_own_annotations(cls: type[Method]) -> None:
    defaults = {name: parameter.default for name, parameter in cls.hyper().items()}
    assert registry.configure(cls, None, defaults) == defaults
    for name, preset in cls.presets.items():
        assert registry.configure(cls, name, preset.hyper) == defaults | dict(preset.hyper)


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("l2-sp", {"alpha": -1}),
        ("full", {"head_lr": -1}),
        ("lp-ft", {"layer_decay": 0}),
        ("probe", {"C": -2}),
    ],
)
def test_values_that_make_no_sense_are_refused(method: str, hyper: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="does not fit: input should be greater than"):
        registry.configure(registry.get(method), None, hyper)
