"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) of two images, if its package and the weights of its network are on this machine.

Nothing is downloaded: the package `lpips` would fetch AlexNet's weights through torchvision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from sana_export.formats.arrays import Array

PACKAGES = ("lpips", "torchvision")
#: The weights of torchvision's AlexNet in PyTorch's cache.
WEIGHTS = "alexnet-owt-7be5be79.pth"

#: The distance of two uint8 images [H, W, 3]: 0 for equal images, and less is better.
Distance = Callable[[Array, Array], float]


def find() -> tuple[Distance | None, str | None]:
    """The distance, or None and the reason why there is none."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        return None, f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    if not path.is_file():
        return None, f"there is no {path}, and weights are not downloaded here"
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    @torch.no_grad()
    def distance(image: Array, reference: Array) -> float:
        pair = (torch.from_numpy(value.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for value in (image, reference))
        return float(network(*pair))

    return distance, None
