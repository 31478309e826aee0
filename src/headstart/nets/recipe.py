"""The strong, plain recipe per family of networks: what a comparison has to be fair to.

All values are for batches of 32 to 64 and hundreds to thousands of labels. Origins, by letter:

    [B]  BiT-HyperRule (Kolesnikov et al., arXiv 1912.11370): SGD, momentum 0.9, one rule for all tasks
    [K]  Kornblith et al., arXiv 1805.08974: Nesterov momentum; 0.01 lies inside the range that wins
    [L]  Li et al., "Rethinking the hyperparameters for fine-tuning", arXiv 2002.11770: what matters is
         lr / (1 - momentum); 0.001 to 0.03 at momentum 0.9, weight decay 0 to 5e-4
    [D]  Measured here: efficientnet-lite0 on about 300 clipart drawings, 5 epochs, seed 0. SGD at 0.01 with a
         head at ten times that ends at chance with kept statistics, 0.003 learns; AdamW at 3e-4 reaches
         59 % against 52 to 53 % of SGD at 0.003. Gradients of depthwise and dense kernels differ in scale
         by far, which Adam's steps do not see; the papers of these networks use RMSProp (arXiv 1905.11946)
    [C]  ConvNeXt's fine-tuning recipe (Liu et al., arXiv 2201.03545, appendix A.2): AdamW, 5e-5, cosine
    [V]  AdamW at 5e-4 or more destroys a ViT-B on near domains, 1e-5 to 3e-4 is safe (VTAB-1k logs of
         Mai et al., arXiv 2409.16434); weight decay 0.05, warm-up of 10 %, norm clipped at 1
    [S]  label smoothing 0.1: Szegedy et al., arXiv 1512.00567
    [T]  statistics of BatchNorm: kept at evaluation's values where batches or data are small; the
         literature is split for the rest, so a run may ask for either
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.records import Norm, OptimizerName, Recipe

Family = Literal["batchnorm-cnn", "depthwise-cnn", "layernorm-cnn", "plain-cnn", "transformer"]

# [T] Below these a batch's statistics are too noisy to train with.
FEW_PICTURES = 500
SMALL_BATCH = 16


# What a family gets where it is asked to use the other optimiser: 0.003 learns [D], and lies in [L].
_OTHERWISE: dict[OptimizerName, dict[str, float]] = {
    "sgd": {"lr": 0.003, "weight_decay": 1e-4},
    "adamw": {"lr": 3e-4, "weight_decay": 0.05},
}


def family(net: nn.Module) -> Family:
    """What kind of network this is, found from its modules and never from its name.

    - "transformer": two or more layers of multi-head attention (ViT, Swin, MaxViT, MobileViT). One alone
      is a pooling layer (CLIP's ResNets).
    - "batchnorm-cnn": most norms are BatchNorm (ResNet, RegNet, DenseNet).
    - "depthwise-cnn": so too, and an eighth or more of its convolutions are depthwise (EfficientNet,
      MobileNet).
    - "layernorm-cnn": most norms look at one picture at a time over all its channels (ConvNeXt, PoolFormer,
      MLP-Mixer, which learns as these do).
    - "plain-cnn": GroupNorm, or no norms at all (BiT, NFNet, VGG).
    """
    if sum(_attends(module) for module in net.modules()) >= 2:
        return "transformer"
    batch = layer = group = convolutions = depthwise = 0
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            convolutions += 1
            depthwise += module.groups == module.in_channels > 1
        if isinstance(module, _BatchNorm):
            batch += 1
        elif isinstance(module, nn.GroupNorm) and module.num_groups > 1:
            group += 1
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
            layer += 1
    if batch and batch >= max(layer, group):
        return "depthwise-cnn" if depthwise >= convolutions / 8 else "batchnorm-cnn"
    return "layernorm-cnn" if layer and layer >= group else "plain-cnn"


def recipe(
    net: nn.Module,
    *,
    train_size: int,
    batch_size: int,
    pretrained: bool = True,
    optimizer: OptimizerName | None = None,
    follows: OptimizerName | None = None,
) -> Recipe:
    """The baseline recipe for this network on this much data.

    Random weights bear and need larger steps than pretrained ones, and their statistics say nothing yet:
    ten times the rate, which turns these fine-tuning rates into the families' usual training rates, and
    BatchNorm in training mode.

    Args:
        net: the network; only its modules are looked at.
        train_size: pictures to learn from.
        batch_size: pictures per step on one device.
        pretrained: whether it starts from weights that somebody trained.
        optimizer: another than the family's, with the rate and decay that belong to it: a rate for AdamW
            is a tenth of what SGD needs.
        follows: the one whose steps a method foresees: taken unless another is asked for, and without
            clipping, for a clipped step is not the one that was foreseen.
    """
    tuning = _tuning(net, train_size, batch_size)
    optimizer = optimizer or follows
    if follows is not None:
        tuning = tuning.model_copy(update={"clip": None})
    if optimizer is not None and optimizer != tuning.optimizer:
        tuning = tuning.model_copy(update={"optimizer": optimizer} | _OTHERWISE[optimizer])
    return tuning if pretrained else tuning.model_copy(update={"lr": 10 * tuning.lr, "norm": "train"})


def _tuning(net: nn.Module, train_size: int, batch_size: int) -> Recipe:
    kind = family(net)
    norm: Norm = "eval" if train_size < FEW_PICTURES or batch_size < SMALL_BATCH else "train"  # [T]
    if kind == "batchnorm-cnn":
        return Recipe(
            optimizer="sgd",  # [B] [K]
            lr=0.003,  # [L]; its middle, because a fresh head learns at ten times this rate [D]
            momentum=0.9,  # [B]
            nesterov=True,  # [K]
            weight_decay=1e-4,  # [L]
            schedule="cosine",
            warmup=0.05,
            label_smoothing=0.1,  # [S]
            clip=None,
            norm=norm,
        )
    if kind == "depthwise-cnn":
        return Recipe(
            optimizer="adamw",  # [D]
            lr=3e-4,  # [D]
            momentum=0.9,
            weight_decay=0.05,  # [V]
            schedule="cosine",
            warmup=0.05,
            label_smoothing=0.1,  # [S]
            clip=None,
            norm=norm,
        )
    if kind == "plain-cnn":
        return Recipe(
            optimizer="sgd",  # [B], whose networks have GroupNorm
            lr=0.003,
            momentum=0.9,
            nesterov=True,
            weight_decay=1e-4,
            schedule="cosine",
            warmup=0.05,
            label_smoothing=0.1,
            clip=1.0,  # nothing else bounds a step here; NFNets are trained with clipping (arXiv 2102.06171)
            norm=norm,
        )
    return Recipe(
        optimizer="adamw",  # [C] [V]
        lr=1e-4 if kind == "layernorm-cnn" else 5e-5,  # [V]; [C] has 5e-5 at batches of 512
        momentum=0.9,
        weight_decay=0.05,  # [V]
        schedule="cosine",
        warmup=0.1,  # [V]
        label_smoothing=0.1,
        clip=1.0,  # [V]
        norm=norm,  # MobileViT and its like have BatchNorm too
    )


def _attends(module: nn.Module) -> bool:
    # torch's and timm's attention layers all say how many heads they have.
    said = any(isinstance(getattr(module, name, None), int) for name in ("num_heads", "heads"))
    return said and any(True for _ in module.parameters())
