"""FullyShardedDataParallel, both of torch's: parameters whose storages are freed between the passes, in 16 bits too."""

import warnings

import pytest

from anybn.conformance import inputs


def net():
    import torch

    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16))


def fsdp1(model, group, mixed):
    import torch
    from torch.distributed import fsdp

    half = torch.bfloat16
    policy = fsdp.MixedPrecision(
        param_dtype=half, reduce_dtype=torch.float32, buffer_dtype=half, _module_classes_to_ignore=()
    )
    return fsdp.FullyShardedDataParallel(
        model,
        process_group=group,
        device_id=torch.device("cpu"),
        mixed_precision=policy if mixed else None,
        auto_wrap_policy=fsdp.wrap.ModuleWrapPolicy({type(layer) for layer in model if list(layer.parameters())}),
        use_orig_params=True,
    )


def fsdp2(model, group, mixed):
    import torch
    from torch.distributed import device_mesh, fsdp

    half = torch.bfloat16
    policy = {"param_dtype": half, "reduce_dtype": torch.float32} if mixed else {}
    options = {
        "mp_policy": fsdp.MixedPrecisionPolicy(**policy),
        "mesh": device_mesh.DeviceMesh.from_group(group, "cpu"),
    }
    for layer in (*(layer for layer in model if list(layer.parameters())), model):
        fsdp.fully_shard(layer, **options)
    return model


@pytest.mark.members("gloo", sizes=(2,))
@pytest.mark.parametrize("way", ["fsdp1", "fsdp1 mixed", "fsdp2", "fsdp2 mixed"])
def test_fully_sharded(member, way):
    """Training is torch's, whose statistics of float32 and 16 bits are less exact; FSDP2 mixed is too much for it."""
    import torch

    import anybn.torch

    mixed = way.endswith("mixed")
    shard = fsdp1 if way.startswith("fsdp1") else fsdp2

    def trained(model, shard):
        model = shard(model, member.group, mixed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            x = torch.from_numpy(inputs.normal((8, 6), 2 * step + member.rank)).float() * 3 + 1
            y = model(x)
            y.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        y = model.eval()(x)
        kept = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        return y.float(), [(m.running_mean.float(), m.running_var.float()) for m in kept]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch deprecates inside itself
        ours = trained(anybn.torch.convert(net()), shard)
        theirs = trained(net(), fsdp1 if mixed else shard)
    close = {"rtol": 0.1, "atol": 0.1} if mixed else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **close)
