"""The tests of the tests: that none goes missing."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_test_module_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_broken.py").write_text("from anybn import no_such_name\n\ndef test_nothing() -> None: ...\n")
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-n0", "-p", "no:cacheprovider", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stdout
    assert "cannot import name 'no_such_name'" in done.stdout
