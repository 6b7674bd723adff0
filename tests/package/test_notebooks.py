"""The notebooks run from top to bottom; what they assert holds. They are kept without outputs."""

import pytest
from pages import DOCS

nbformat = pytest.importorskip("nbformat", reason="nbformat: not installed, pip install -e '.[docs]'")

NOTEBOOKS = sorted(DOCS.joinpath("notebooks").glob("*.ipynb"))
NEEDS = {"bad_evaluation": ("torch",), "keras_to_torch_to_numpy": ("keras", "torch")}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    client = pytest.importorskip("nbclient", reason="nbclient: not installed, pip install -e '.[docs]'")
    for library in ("sklearn", "matplotlib", "ipykernel", *NEEDS.get(path.stem, ())):
        pytest.importorskip(library, reason=f"the notebook needs {library}, which is not installed")
    notebook = nbformat.read(path, as_version=4)
    assert any("assert" in cell.source for cell in notebook.cells)
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()  # raises


def test_they_are_three_and_have_no_outputs():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
