"""The Python of docs/torch.md runs as it stands there, and prints what it says."""

import re
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch: not installed, pip install torch")


def test_the_page_runs(capsys, monkeypatch):
    monkeypatch.setattr("anybn.torch.classes._registered", {})
    text = (Path(__file__).parents[2] / "docs" / "torch.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
    exec(compile(code, "docs/torch.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.M)
