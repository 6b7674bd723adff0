"""Where a file cannot simply be replaced, and what is left of a save that was killed."""

import os
import stat
import subprocess
import sys
import threading

import pytest

import anybn
from anybn.checkpoints import files
from anybn.conformance import inputs


@pytest.fixture(autouse=True)
def library():
    pytest.importorskip("safetensors", reason="safetensors: not installed")


def test_saving_to_a_pipe_leaves_it_one(tmp_path):
    pipe, state = tmp_path / "pipe", anybn.BatchNormState(3)
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for path in (pipe, link):
        received = []
        reader = threading.Thread(target=lambda received=received: received.append(pipe.read_bytes()), daemon=True)
        reader.start()
        state.save(path)
        reader.join(timeout=60)
        (tmp_path / "bn.safetensors").write_bytes(received[0])
        assert inputs.state_values(anybn.BatchNormState.load(tmp_path / "bn.safetensors")) == inputs.state_values(state)
        assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_name_may_be_as_long_as_names_may_be(tmp_path):
    path = tmp_path / ("b" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    anybn.BatchNormState(3).save(path)
    anybn.BatchNormState(3).save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_save_leaves_nothing(tmp_path):
    path = tmp_path / "bn.safetensors"
    if not files._written_without_name(path, b""):
        pytest.skip("this file system has no files without a name")
    anybn.BatchNormState(3).save(path)
    before = path.read_bytes()
    code = (
        "import os, sys, anybn\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), 9)\n"
        "anybn.BatchNormState(4).save(sys.argv[1])"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_where_every_file_has_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_written_without_name", lambda path, content: False)
    path, state = tmp_path / "bn.safetensors", anybn.BatchNormState(3)
    state.save(path)
    assert inputs.state_values(anybn.BatchNormState.load(path)) == inputs.state_values(state)
    assert list(tmp_path.iterdir()) == [path]
