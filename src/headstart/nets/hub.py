"""Weights that timm publishes: found on this machine without a network, or why they cannot be fetched."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError

from headstart.errors import ModelError, Unreachable, first_line
from headstart.nets import architecture
from headstart.nets.architecture import Architecture, quiet

# Seconds to wait for a server's first answer.
_PATIENCE = 10

# timm prefers them in this order.
FILES = ("model.safetensors", "pytorch_model.bin")


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library of the Hugging Face client raises when a connection fails or breaks off.

    The client changed its library twice (requests, httpx, httpx2): it is found from the client's own error.
    """
    library = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    named = (getattr(library, name, None) for name in ("TransportError", "ConnectionError", "Timeout"))
    return tuple(each for each in named if isinstance(each, type) and issubclass(each, Exception))


TRANSPORT = _transport_errors()

# What timm, torch.hub and the Hugging Face client raise: HTTP errors and no network are OSErrors too.
FAILURES: tuple[type[Exception], ...] = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    AssertionError,
    UnpicklingError,
    SafetensorError,
    *TRANSPORT,
)


def cached(config: Mapping[str, Any]) -> Path | None:
    """The weights of a pretrained config that are on this machine already; looks at no network.

    Args:
        config: timm's, with `hf_hub_id`, `hf_hub_filename` and `url`.
    """
    repository, _, revision = str(config.get("hf_hub_id") or "").partition("@")
    if repository:
        own = config.get("hf_hub_filename")
        for name in [own] if own else FILES:
            try:
                found = try_to_load_from_cache(repository, name, revision=revision or None)
            except HFValidationError:
                break
            if isinstance(found, str):
                return Path(found)
    url = config.get("url")
    if url:
        address, name = (url[0], url[1]) if isinstance(url, tuple | list) else (url, "")
        path = Path(torch.hub.get_dir()) / "checkpoints" / (name or Path(urlparse(address).path).name)
        if path.is_file():
            return path
    return None


def described(name: str) -> Architecture:
    """The architecture that a repository of the Hugging Face Hub describes, fetched where it is not here.

    Args:
        name: "owner/name", with "@revision" or without.

    Raises:
        ModelError: no such repository, or not one of a timm model.
        Unreachable: not on this machine, and no network.
    """
    repository, _, revision = name.partition("@")
    with quiet(), no_bars():
        try:
            path = try_to_load_from_cache(repository, "config.json", revision=revision or None)
            if not isinstance(path, str):
                if not reachable(repository):
                    raise ConnectionError(repository)
                path = hf_hub_download(repository, "config.json", revision=revision or None)
        except HFValidationError as error:
            raise ModelError(f"'{name}' is neither a model of timm's nor a repository's name.") from error
        except FAILURES as error:
            if offline(error):
                raise Unreachable(
                    f"'{name}' is not on this machine and the Hugging Face Hub cannot be reached. "
                    "Download the repository elsewhere and give its folder as --model."
                ) from error
            raise ModelError(
                f"The Hugging Face Hub has no timm model '{name}': {first_line(error)}"
            ) from error
    found = architecture.described(Path(path).parent)
    return Architecture(
        found.name,
        found.num_classes,
        found.kwargs,
        {**found.pretrained_cfg, "hf_hub_id": name, "source": "hf-hub"},
    )


def reachable(place: str) -> bool:
    """Whether a server answers at all; asked first, because the clients retry for most of a minute.

    Args:
        place: "https://...", or a repository of the Hugging Face Hub.
    """
    if not place.startswith(("http://", "https://")):
        if constants.HF_HUB_OFFLINE:
            return False
        place = constants.ENDPOINT
    try:
        with urlopen(Request(place, method="HEAD"), timeout=_PATIENCE):
            return True
    except HTTPError:
        return True  # it answered
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the clients may know certificates that we do not
    except (OSError, ValueError):
        return False


def offline(error: BaseException) -> bool:
    """Whether this came of having no network, and not of a wrong name or a broken file."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError | TimeoutError):
            return True
        if isinstance(seen, HfHubHTTPError):
            return seen.response.status_code >= 500
        if isinstance(seen, (URLError, *TRANSPORT)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def no_bars() -> Iterator[None]:
    """Without the Hugging Face client's own progress bars."""
    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()
