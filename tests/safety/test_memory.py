"""Memory that others resize or free, and tensors whose address says nothing."""

from anybn import norms, variants
from safety import survives

# -- memory that others resize ---------------------------------------------------------------------------------------


def test_storages_stay_resizable(torch):
    import anybn.torch

    m = anybn.torch.BatchNorm1d(512)
    calls = {
        "moments": anybn.moments,
        "layer_norm": norms.layer_norm,
        "rms_norm": norms.rms_norm,
        "batch_norm": lambda x: anybn.batch_norm(x, anybn.BatchNormState(512), training=True),
        "batch_norm_vjp": lambda x: anybn.batch_norm_vjp(x, anybn.BatchNormState(512), training=True)[1](x),
        "variants": lambda x: variants.batch_norm(x, anybn.BatchNormState(512)),
        "module": m,
        "module in evaluation": m.eval(),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for call in calls.values():
            for rows in (8, 600):
                x = torch.randn(rows, 512).to(dtype)
                call(x)
                x.resize_(rows + 2, 512)
                x = torch.randn(rows, 512).to(dtype)
                call(x)
                x.untyped_storage().resize_(0)
    for t in (m.weight, m.bias, m.running_mean, m.running_var):
        t.detach().untyped_storage().resize_(0)


def test_x_can_be_what_cat_fills(torch):
    x = torch.randn(8, 4)
    norms.layer_norm(x)
    parts = torch.randn(3, 10, 4).unbind()
    torch.cat(parts, out=x.resize_(0))
    assert torch.equal(x, torch.cat(parts))


def test_freed_storages_are_errors(torch):
    survives("""
        import torch, anybn, anybn.torch
        from anybn import norms
        for shape in ((8, 64), (2000, 64)):
            for name in ("x", "weight", "bias", "running_mean", "running_var", "residual"):
                for training in (True, False):
                    m = anybn.torch.BatchNorm1d(64).train(training)
                    x, residual = torch.randn(shape), torch.randn(shape)
                    freed = {"x": x, "residual": residual}.get(name)
                    freed = getattr(m, name) if freed is None else freed
                    freed.detach().untyped_storage().resize_(0)
                    try:
                        m(x, residual)
                    except TypeError as error:
                        assert f"{name} has no memory: its storage was freed" in str(error), error
                    else:
                        raise AssertionError((shape, name, training))
                    assert int(m.num_batches_tracked) == 0
        x = torch.randn(8, 64)
        x.untyped_storage().resize_(0)
        for call in (anybn.moments, norms.layer_norm):
            try:
                call(x)
            except TypeError as error:
                assert "x has no memory" in str(error), error
            else:
                raise AssertionError(call)
    """)


# -- tensors whose address says nothing ------------------------------------------------------------------------------


def test_weights_that_are_no_plain_memory(torch):
    import anybn.torch

    class Wrapped(torch.Tensor):
        """Its values lie in another tensor, as DTensor's do."""

        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            def unwrap(a):
                return a.inner if isinstance(a, Wrapped) else a

            inner, options = torch.utils._pytree.tree_map(unwrap, (args, kwargs or {}))
            result = function(*inner, **options)
            return Wrapped(result) if function is torch.ops.aten.detach.default else result

    values = torch.tensor([2.0, 3.0, 4.0, 5.0])
    for shape in ((8, 4), (40000, 4)):
        x = torch.randn(shape)
        ways = {
            "wrapped": lambda: (Wrapped(values), Wrapped(-values)),
            "negated": lambda: (torch._neg_view(-values), torch._neg_view(values)),
        }
        for way, made in ways.items():
            plain = anybn.torch.BatchNorm1d(4)
            plain.weight = torch.nn.Parameter(values, requires_grad=False)
            plain.bias = torch.nn.Parameter(-values, requires_grad=False)
            m = anybn.torch.BatchNorm1d(4)
            m.weight, m.bias = (torch.nn.Parameter(a, requires_grad=False) for a in made())
            for training in (True, False):
                torch.testing.assert_close(m.train(training)(x), plain.train(training)(x), msg=way)
                for a, b in zip(m.buffers(), plain.buffers(), strict=True):
                    torch.testing.assert_close(a, b)
        m = anybn.torch.BatchNorm1d(4)
        m.running_mean, m.running_var = torch._neg_view(torch.zeros(4).double() - 7), torch._neg_view(-m.running_var)
        expected = anybn.torch.BatchNorm1d(4)
        expected.running_mean += 7
        for module in (m, expected):
            module(x)
            module.eval()
        torch.testing.assert_close(m.running_mean.resolve_neg(), expected.running_mean)
        torch.testing.assert_close(m(torch._neg_view(x)), expected(-x))
