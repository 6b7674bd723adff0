"""What a converted model does as the original does, for every architecture of timm and ten of torchvision's.

    python benchmarks/real_models.py             # all, into benchmarks/results/models.json
    python benchmarks/real_models.py resnet18    # one, printed

The checks are those of ``tests/models``, and so are the lists: an architecture with a size is evaluated, trained and
exported on images of this size, the others are converted, reverted and traced without values.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from models import checks, conftest, test_models  # noqa: E402, F401

RESULTS = ROOT / "benchmarks/results/models.json"


def outcome(check, *args):
    """ "yes", what the check says instead, or the error."""
    try:
        return check(*args) or "yes"
    except Exception as error:
        return f"no: {type(error).__name__}: {str(error)[:200]}"


def row(build, size):
    if size is None:
        with torch.device("meta"):
            model = build()
        return {"converts": outcome(checks.convert_and_revert, model), "traced": outcome(checks.trace, model)}
    torch.manual_seed(0)
    model, x = build(), torch.randn(4, 3, size, size)
    with torch.no_grad():
        model.train()(x)
    return {
        "size": size,
        "converts": outcome(checks.convert_and_revert, model),
        "evaluates": outcome(checks.evaluation, model, x),
        "traced": outcome(checks.trace, model),
        "onnx": outcome(checks.onnx, model, x),
        "exported": outcome(checks.export, model, x),
        "trains": outcome(checks.training, model, x),
    }


def main(names):
    import timm
    import torchvision

    warnings.simplefilter("ignore")
    versions = {"torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
    table = {"python": platform.python_version(), **versions, "timm's": {}, "torchvision's": {}}
    for name, size in test_models.SIZES.items():
        if not names or name in names:
            start = time.perf_counter()
            table["timm's"][name] = found = row(lambda name=name: timm.create_model(name), size)
            print(f"{name} ({time.perf_counter() - start:.1f} s): {found}", flush=True)
    for name in test_models.TORCHVISIONS if not names else ():
        table["torchvision's"][name] = found = row(lambda name=name: test_models.of_torchvision(name), 64)
        print(f"{name}: {found}", flush=True)
    if not names:
        RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
