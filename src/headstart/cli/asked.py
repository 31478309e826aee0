"""What a person asked for, out of a YAML file, flags and --set: one dictionary of fields of `Run`.

What comes later wins: defaults, the method's preset, the file, flags and --set.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from headstart.disk import write_text
from headstart.errors import ConfigError, nearest, unknown
from headstart.records import Run

# YAML 1.1 reads 1e-3 as text, people mean a number.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def asked(
    *,
    config: Path | None,
    flags: Mapping[str, Any],
    sets: Sequence[str] | None,
    extra: Collection[str] = (),
    per_method: bool = False,
) -> dict[str, Any]:
    """The fields that were given, by whichever way.

    Args:
        config: a YAML file.
        flags: fields that were given as flags.
        sets: `key=value`; a key may be `hyper.name`, or the bare name of a hyper-parameter.
        extra: names besides those of `Run` that this command understands.
        per_method: whether hyper-parameters may be given by method, as `l2-sp.alpha=0.1`.

    Raises:
        ConfigError: a file that cannot be read, a key that does not exist, a field given twice.
    """
    fields = {} if config is None else _file(config, extra)
    hyper: dict[str, Any] = dict(fields.pop("hyper", None) or {})
    assigned = _assignments(sets or [], extra, per_method)
    for name in assigned.keys() & flags.keys():
        raise ConfigError(f"'{name}' is given twice: as a flag and with --set. Leave one of them out.")
    for name, value in assigned.pop("hyper", {}).items():
        both = isinstance(value, dict) and isinstance(hyper.get(name), dict)
        hyper[name] = {**hyper[name], **value} if both else value
    fields |= dict(flags) | assigned
    return fields | ({"hyper": hyper} if hyper else {})


def check_hyper(fields: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Refuse a hyper-parameter that none of the methods has; it may be a mistyped field of a run.

    Raises:
        ConfigError: with the nearest name among hyper-parameters and fields.
    """
    from headstart import registry

    if not fields.get("hyper"):
        return
    known = sorted({name for method in methods for name in registry.get(method).hyper()})
    for name in fields["hyper"]:
        if name in known:
            continue
        whose = " or ".join(f"'{method}'" for method in methods)
        if nearest(name, [*known, *_FIELDS]) is not None:
            raise ConfigError(unknown(f"field, or hyper-parameter of {whose},", name, [*known, *_FIELDS]))
        if not known:
            raise ConfigError(f"Unknown field '{name}'; {whose} has no hyper-parameters.")
        raise ConfigError(unknown(f"hyper-parameter of {whose}", name, known))


def write(path: Path, given: Mapping[str, Any], settled: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what was asked as YAML that --config takes, and what was settled for the rest as comments.

    Args:
        path: of the file.
        given: fields that were asked for.
        settled: by name of the run or method, the values that were open and what they became.
    """
    lines = ["# What was asked. `--config` with this file asks for the same again.\n", _yaml(given)]
    for name, values in settled.items():
        lines.append(f"\n# Settled for {name}:\n")
        lines += [f"#   {line}\n" for line in _yaml(values).splitlines()]
    write_text(path, "".join(lines))


_FIELDS = [name for name in Run.model_fields if name != "hyper"]


def _yaml(values: Mapping[str, Any]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _file(path: Path, extra: Collection[str]) -> dict[str, Any]:
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ConfigError(f"{path} holds {type(read).__name__}; lines such as 'epochs: 20' are expected.")
    allowed = [*Run.model_fields, *extra]
    for name in read:
        if name not in allowed:
            raise ConfigError(f"{path}: {unknown('key', str(name), allowed)}")
    if not isinstance(read.get("hyper") or {}, dict):
        raise ConfigError(f"{path}: hyper holds {read['hyper']!r}; lines such as 'alpha: 0.1' are expected.")
    return {name: _number(value) for name, value in read.items() if value is not None}


def _assignments(sets: Sequence[str], extra: Collection[str], per_method: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    hyper: dict[str, Any] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE, such as --set lr=0.01; '{text}' was given.")
        field = key.replace("-", "_")
        if field in (*_FIELDS, *extra):
            where, name = fields, field
        else:  # the bare name of a hyper-parameter; the method knows
            where, name = hyper, key.removeprefix("hyper.")
            owner, dot, rest = name.rpartition(".")
            if dot and per_method and owner and rest:
                where, name = hyper.setdefault(owner, {}), rest
            elif dot:
                raise ConfigError(f"--set {key}: only hyper has parts, such as hyper.alpha=0.1.")
            elif name in ("hyper", ""):
                raise ConfigError(f"--set {key}: name a hyper-parameter, such as hyper.alpha=0.1.")
        if name in where:
            raise ConfigError(f"--set gives '{key}' twice.")
        where[name] = _value(text, value)
    return fields | ({"hyper": hyper} if hyper else {})


def _value(text: str, value: str) -> Any:
    try:
        return _number(yaml.safe_load(value))
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not YAML: {' '.join(str(error).split())}") from None


def _number(value: Any) -> Any:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, dict):
        return {name: _number(each) for name, each in value.items()}
    return [_number(each) for each in value] if isinstance(value, list) else value
