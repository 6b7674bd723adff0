"""The tests that any backend must pass, shipped so that anybody can run them::

    pytest --pyargs anybn.conformance --anybn-backend=NAME

NAME is what ``state.to(NAME)`` takes: ``numpy``, ``torch``, ``torch:cuda``, ``cupy``, ``jax``, ``dask``, ``mlx``,
``ndonnx``, ``array_api_strict:no_float64``, a registered backend's. One that is asked for and missing is an error.
``-m quick`` runs a short selection.

The parts are for other projects' tests, too; ``docs/testing.md`` lists them and shows how. `oracle` has every expected
value, in long double, and shares no code with the package; `inputs` has the data that breaks batch norms; `targets`
says where a test runs, and how large an error may be. Tests that take ``anybn_target`` run on every installed backend.

>>> import anybn
>>> from anybn.conformance import inputs, oracle
>>> x = inputs.cast(inputs.ROWS["mean 1e6, std 1"](inputs.normal((8, 3, 5))), "float32")
>>> y = anybn.batch_norm(x, anybn.BatchNormState(3), training=True)
>>> statistics = oracle.statistics(x)
>>> oracle.error(y, oracle.normalize(x, statistics.mean, statistics.var()), "float32") < 0.51  # in eps of float32
True
"""
