"""torchvision, which timm needs, where its wheel is of another build than torch."""

import contextlib
import importlib.util
import sys


def _lets_torchvision_import() -> None:
    """Its wheel for CUDA does not load its operators beside a torch for the CPU, and then asks for two of them."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _lets_torchvision_import.library = library  # type: ignore[attr-defined]


if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    _lets_torchvision_import()
