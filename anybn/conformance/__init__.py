"""The tests that any backend must pass, shipped so that anybody can run them::

    pytest --pyargs anybn.conformance --anybn-backend=NAME

NAME is what ``state.to(NAME)`` takes: ``numpy``, ``torch``, ``torch:cuda``, ``cupy``, ``jax``, ``dask``,
``array_api_strict:no_float64``, a registered backend's. One that is asked for and missing is an error. ``-m quick``
runs a short selection.

Every expected value comes from `anybn.conformance.oracle`, which shares no code with the package.
"""
