"""The site builds with every warning an error, and its navigation has every page."""

import os
import re
import subprocess
import sys

import pytest
from pages import DOCS, ROOT

REFERENCE = DOCS / "reference"


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site: not installed, pip install -e '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    html = (tmp_path / "reference" / "anybn" / "index.html").read_text()
    assert 'id="anybn.batch_norm"' in html
    assert '<span class="gp">&gt;&gt;&gt; </span>' in html  # examples are code
    for page in tmp_path.rglob("*.html"):
        text = page.read_text()  # nothing is fetched from elsewhere, and every snippet is there
        assert not re.search(r'<(script|img|link rel="stylesheet")[^>]*(src|href)="https?:|--8 ?&lt; ?--', text), page


def test_the_reference_has_everything_public():
    import anybn

    shown = set(re.findall(r"^::: anybn\.(\w+)$", (REFERENCE / "anybn.md").read_text(), re.M))
    assert shown == set(anybn.__all__) - {"backends"}  # a function and a package: its entry has another path
    frameworks = "torch", "jax", "flax", "equinox", "haiku", "keras"
    for module in (*frameworks, "variants", "norms", "interop", "distributed", "diagnosis", "backends", "conformance"):
        assert f"::: anybn.{module}\n" in (REFERENCE / f"{module}.md").read_text()
