"""A bundle on the Hugging Face Hub, under one's own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headstart.errors import ConfigError, ModelError, Unreachable, first_line
from headstart.ship import folder as files


def plan(repo: str, folder: str | Path | None = None, *, private: bool = False) -> dict[str, Any]:
    """What a push would do, as plain data; looks at no network.

    Args:
        repo: "owner/name" on the Hub.
        folder: the bundle; its files are listed with their sizes in bytes.
        private: whether only the owner can see it.

    Raises:
        ConfigError: a name that the Hub does not take, or its client is not installed.
        ModelError: the folder is no bundle, or was altered.
    """
    hub = _client()
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise ConfigError(f"'{repo}' is no name on the Hub. {first_line(error)}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"'{repo}' has no owner. Give OWNER/NAME.")
    listed: dict[str, int] = {}
    if folder is not None:
        path = Path(folder)
        if not (path / files.CONFIG).is_file():
            raise ModelError(f"'{path}' is no bundle: it has no {files.CONFIG}.")
        listed = {each.name: each.stat().st_size for each in sorted(path.iterdir()) if each.is_file()}
        files.check(path, listed)
    return {"repo": repo, "url": f"https://huggingface.co/{repo}", "private": private, "files": listed}


def push(folder: str | Path, repo: str, *, private: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Put a bundle on the Hub; the repository is made where there is none.

    Who one is there comes from `hf auth login` or HF_TOKEN.

    Args:
        folder: the bundle.
        repo: "owner/name".
        private: a new repository is seen by its owner alone.
        dry_run: nothing is sent and no network is looked at.

    Returns:
        What was sent, or would be: `repo`, `url`, `private`, `files` with their sizes.

    Raises:
        ConfigError: the Hub does not take the name, or does not let one write there.
        ModelError: the folder is no bundle, or was altered.
        Unreachable: the Hub does not answer.
    """
    wanted = plan(repo, folder, private=private)
    if dry_run:
        return wanted
    hub = _client()
    api = hub.HfApi()
    # What its HTTP library, which changed twice, raises when there is no connection.
    no_connection: Any = hub.errors.HfHubHTTPError.__mro__[1]
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=list(wanted["files"]),
            commit_message="Model exported by headstart",
        )
    except hub.errors.HfHubHTTPError as error:
        raise ConfigError(
            f"The Hub refused to write to '{repo}': {first_line(error)} "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        ) from error
    except hub.errors.LocalTokenNotFoundError as error:
        raise ConfigError(
            "You are not logged in to the Hub. Use `hf auth login`, or set HF_TOKEN."
        ) from error
    except (OSError, no_connection) as error:
        raise Unreachable(
            f"The Hub cannot be reached: {first_line(error)} The bundle is whole; send it later."
        ) from error
    return wanted


def _client() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ConfigError("The Hub's client is not installed: pip install 'headstart[hub]'") from error
    return huggingface_hub
