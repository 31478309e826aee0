"""What each of our methods does, in a line, and where it is from. A method that is not listed has neither."""

from __future__ import annotations

from typing import NamedTuple


class Paper(NamedTuple):
    """A method in a line, and its paper."""

    does: str
    cite: str


PAPERS = {
    "scratch": Paper(
        "the same network from random weights", "He, Girshick, Dollár, ICCV 2019, arXiv 1811.08883"
    ),
    "probe": Paper(
        "frozen network, solved linear head",
        "Kornblith, Shlens, Le, CVPR 2019, arXiv 1805.08974, section 4.1",
    ),
    "full": Paper("everything learns", "Kornblith, Shlens, Le, CVPR 2019, arXiv 1805.08974"),
    "lp-ft": Paper(
        "solved head first, then everything",
        "Kumar, Raghunathan, Jones, Ma, Liang, ICLR 2022, arXiv 2202.10054",
    ),
    "l2-sp": Paper(
        "weights are pulled back to where they started",
        "Li, Grandvalet, Davoine, ICML 2018, arXiv 1802.01483",
    ),
    "delta": Paper(
        "feature maps are kept near the source's", "Li, Xiong, et al., ICLR 2019, arXiv 1901.09229"
    ),
    "hybrid-forward": Paper(
        "the network and a frozen one take turns in front of the loss",
        "Song, Wu, Yang, Zhang, Li, Yuan, AAAI 2021",
    ),
    "fitnets": Paper(
        "a hint from the middle of another network, then distillation",
        "Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv 1412.6550",
    ),
    "l2t-w": Paper(
        "learns which channels of another network to match",
        "Jang, Lee, Hwang, Shin, ICML 2019, arXiv 1905.05901",
    ),
    "l2t-ww": Paper(
        "learns which channels to match, and between which layers",
        "Jang, Lee, Hwang, Shin, ICML 2019, arXiv 1905.05901",
    ),
    "transtailor": Paper(
        "channels that matter least for the task are cut away",
        "Liu, Wang, Li, Lin, Zhou, Ji, AAAI 2021, arXiv 2103.01542",
    ),
    "spottune": Paper(
        "each picture takes the pretrained or the tuned copy of every block",
        "Guo, Shi, Kumar, Grauman, Rosing, Feris, CVPR 2019, arXiv 1811.08737",
    ),
    "adafilter": Paper(
        "each picture takes the pretrained or the tuned form of every filter",
        "Guo, Li, Wang, Rosing, AAAI 2020, arXiv 1911.09659",
    ),
}
