"""Mutations of bytes, and of what lies within containers whose lengths and checksums are made right again."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from anybn.checkpoints import files

Mutation = Callable[[Random, bytes, bytes], bytes]
"""(random, content, another content of the kind) -> content"""


def of_bytes(random: Random, content: bytes, other: bytes) -> bytes:
    """A few changes: flipped bits, numbers at their limits, parts that are cut, doubled, moved, or another's."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at, size = random.randrange(len(data) + 1), random.choice((1, 1, 2, 4, 8, 8, 64, 1024))
        kind = random.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            number = random.choice(
                (0, 1, 127, 128, 255, 2**31 - 1, 2**31, 2**63 - 1, 2**64 - 1, random.getrandbits(64))
            )
            data[at : at + size] = (number % 256 ** min(size, 8)).to_bytes(min(size, 8), "little")
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * random.choice((1, 2, 50))
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            begin = random.randrange(len(other) + 1)
            data[at : at + size] = other[begin : begin + size]
        else:
            data[at:at] = random.choice(_TEXTS)
    return bytes(data)


_TEXTS = (b"NaN", b"-1", b"1e999", b"[" * 3000, b'{"a":' * 2000, b'"like": "canary", ', b"9" * 20, b"\x00", b"\xff" * 8)
_VALUES = (
    None,
    True,
    -1,
    0,
    3,
    10**9,
    10**30,
    1e-5,
    float("nan"),
    float("inf"),
    "",
    "canary",
    "BF16",
    [],
    [3],
    {},
    [0, 10**12],
)


def _json(random: Random, value: object) -> object:
    """One place in a tree of JSON changed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        value, key = dict(value), random.choice([*value])
        kind = random.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1:
            value["like"] = "canary"
        elif kind == 2:
            value[random.choice(("weight", "running_var", key + "x"))] = random.choice((value[key], *_VALUES))
        else:
            value[key] = _json(random, value[key])
        return value
    if isinstance(value, list) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        return [*value[:at], _json(random, value[at]), *value[at + 1 :]]
    return random.choice(_VALUES)


def of_safetensors(random: Random, content: bytes, other: bytes) -> bytes:
    """The header as JSON, with its length; in a file of our own also the settings, with their checksum."""
    import safetensors.numpy

    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = header.get("__metadata__", {})
    if "settings" in metadata and random.random() < 0.7:
        tensors = safetensors.numpy.load(content)
        text = metadata["settings"]
        for _ in range(random.choice((1, 1, 2))):
            text = json.dumps(_json(random, json.loads(text)))
        if random.random() < 0.3:
            text = of_bytes(random, text.encode(), b"{}").decode(errors="replace")
        if random.random() < 0.3:
            del tensors[random.choice([*tensors])]
        metadata = metadata | {"settings": text, "sha256": files._checksum(tensors, text)}
        return safetensors.numpy.save(tensors, metadata)
    changed = json.dumps(_json(random, header)).encode()
    return len(changed).to_bytes(8, "little") + changed + content[end:]


def of_zip(random: Random, content: bytes, other: bytes) -> bytes:
    """One member, in a zip that is whole: npy in an npz, the pickle or an array in torch's files."""
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        names = source.namelist()
        chosen = random.choice([name for name in names if name.endswith(".pkl")] * len(names) + names)
        changed = of_bytes(random, source.read(chosen), source.read(random.choice(names)))
    return _with_member(random, content, chosen, changed)


def _with_member(random: Random, content: bytes, chosen: str, changed: bytes) -> bytes:
    """A zip with this member in place of its own, or without any."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w") as zipped:
        for name in source.namelist():
            member = changed if name == chosen else source.read(name)
            if name != chosen or random.random() < 0.95:
                zipped.writestr(name, member, random.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,)))
    return target.getvalue()


def of_keras(random: Random, content: bytes, other: bytes) -> bytes:
    """The config as JSON, or the arrays; in a file of Keras 2 the attribute that holds the config."""
    if not content.startswith(b"PK"):
        return _of_hdf5(random, content, other)
    chosen = random.choice(("config.json", "model.weights.h5"))
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        member = source.read(chosen)
    if chosen == "config.json":
        return _with_member(random, content, chosen, json.dumps(_json(random, json.loads(member))).encode())
    return _with_member(random, content, chosen, _of_hdf5(random, member, member))


def _of_hdf5(random: Random, content: bytes, other: bytes) -> bytes:
    """Links, shapes, dtypes and attributes, in a file that HDF5 itself has written.

    No bytes of it: HDF5 does not promise to end on those, and was seen not to in an attribute with a wrong length.
    """
    import h5py

    buffer = io.BytesIO(content)
    with h5py.File(buffer, "r+") as file:
        for _ in range(random.choice((1, 1, 2))):
            paths: list[str] = []
            file.visit(paths.append)
            with suppress(OSError, ValueError, KeyError, RuntimeError, IndexError):  # a change that HDF5 refuses
                _change_hdf5(random, file, random.choice(paths), paths)
    return buffer.getvalue()


def _change_hdf5(random: Random, file: Any, path: str, paths: list[str]) -> None:
    import h5py
    import numpy as np

    kind = random.randrange(8)
    if kind in (0, 1, 2, 3, 7):
        del file[path]
    if kind == 1:
        target = random.choice(("/etc/hostname", "absent.h5", "."))
        file[path] = random.choice((h5py.SoftLink(random.choice(paths)), h5py.ExternalLink(target, "/x")))
    elif kind == 2:
        shape = random.choice(((), (0,), (5, 5), (2**40,), (6,)))
        dtype = random.choice(("f4", "f8", "i4", "S3", "c8", "f2"))
        file.create_dataset(path, shape, dtype, chunks=True if shape == (2**40,) else None)
    elif kind == 3:
        file[path] = np.array(random.choice((np.nan, -1.0, np.inf, 1e300)) * np.ones(5))
    elif kind == 4:
        key = random.choice(("name", "dtype", "model_config", "canary"))
        file[path].attrs[key] = random.choice(("bfloat16", "", "bn1", 3, np.ones(3), "[" * 300, "a/b"))
    elif kind == 5:
        file.attrs["model_config"] = json.dumps(_json(random, json.loads(file.attrs["model_config"])))
    elif kind == 6:
        file[path + random.choice(("x", "1", "/vars/0", "/gamma"))] = np.ones(5, "f4")
    elif kind == 7:
        file.create_dataset(path, (5,), "f4", external=[(random.choice(("/etc/hostname", "absent")), 0, 20)])


def of_onnx(random: Random, content: bytes, other: bytes) -> bytes:
    """One field of the model."""
    import onnx

    model = onnx.ModelProto.FromString(content)
    graph = model.graph
    for _ in range(random.choice((1, 1, 3))):
        tensor, node = random.choice(graph.initializer), random.choice(graph.node)
        number = random.choice((-1, 0, 1, 2, 3, 5, 10, 16, 2**31 - 1, 2**62))
        kind = random.randrange(9)
        if kind == 0:
            tensor.data_type = number % 2**31
        elif kind == 1:
            tensor.dims.append(number)
        elif kind == 2 and tensor.dims:
            tensor.dims[random.randrange(len(tensor.dims))] = number
        elif kind == 3:
            tensor.raw_data = of_bytes(random, tensor.raw_data, b"\x00\x00\x80\x7f")
        elif kind == 4:
            tensor.data_location = 1
            key = random.choice(("location", "length", "offset", "canary"))
            value = random.choice(("data", "/etc/hostname", "../data", ".", str(number), "-1", "9" * 30))
            tensor.external_data.add(key=key, value=value)
        elif kind == 5:
            name = random.choice(("epsilon", "momentum", "spatial", "value"))
            value = random.choice((float("nan"), -1.0, 0.0, 2.0, 1e30, 0, "text", [1.0], tensor))
            node.attribute.append(onnx.helper.make_attribute(name, value))
        elif kind == 6:
            names = [name for n in graph.node for name in (*n.input, *n.output)]
            if node.input:
                node.input[random.randrange(len(node.input))] = random.choice(names)
        elif kind == 7:
            node.op_type = random.choice(("BatchNormalization", "Constant", "Identity", "canary"))
        elif kind == 8:
            node.ClearField(random.choice(("input", "output", "attribute")))
    return model.SerializeToString()
