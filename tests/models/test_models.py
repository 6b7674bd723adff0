"""Real models: timm's architectures with batch norms, and ten of torchvision's, converted.

``architectures.txt`` has all of timm's. Those with a size beside them, one of each family, are evaluated, trained and
exported on images of this size; all are converted, reverted and traced, without values.
"""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch: not installed, pip install torch")
timm = pytest.importorskip("timm", reason="timm: not installed, pip install anybn[models]")

from models import checks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # the models', and torch's about its exporters
LINES = (Path(__file__).parent / "architectures.txt").read_text().splitlines()
SIZES = {name: None if size == "-" else int(size) for name, size in (line.split() for line in LINES)}
ALWAYS = ("resnet18", "efficientnet_b0", "densenet121", "mobilenetv3_small_050", "regnetx_002", "levit_128s")
TORCHVISIONS = ("resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5")
TORCHVISIONS += ("efficientnet_b0", "regnet_y_400mf", "googlenet", "resnext50_32x4d")


def of_torchvision(name):
    import torchvision

    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    return torchvision.models.get_model(name, **options)


def whole(names):
    return [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in names]


def check_everything(model, size):
    torch.manual_seed(0)
    x = torch.randn(4, 3, size, size)
    with torch.no_grad():
        model.train()(x)  # running statistics of its own
    checks.convert_and_revert(model)
    checks.evaluation(model, x)
    checks.trace(model)
    checks.onnx(model, x)
    checks.export(model, x)
    checks.training(model, x)


@pytest.mark.parametrize("name", whole(name for name, size in SIZES.items() if size))
def test_a_family_of_timm(name):
    torch.manual_seed(0)
    check_everything(timm.create_model(name), SIZES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, size in SIZES.items() if not size])
def test_every_architecture_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    checks.convert_and_revert(model)
    checks.trace(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISIONS)
def test_models_of_torchvision(name):
    check_everything(of_torchvision(name), 64)


@pytest.mark.slow
def test_the_list_is_of_all():
    """A release of timm with new ones shows here."""
    found = []
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        if checks.batch_norms(model):
            found.append(name)
    assert set(SIZES) <= set(found)
