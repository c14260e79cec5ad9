"""The notebooks run from top to bottom, in a short setting, and are stored without output."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

COLAB = Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)
    assert "tensorflow" not in path.read_text().lower()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_project_folder_beside_a_notebook_is_not_taken_for_the_package(path, tmp_path, monkeypatch):
    cell = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    (tmp_path / "sscl_jax" / "sscl_jax").mkdir(parents=True)  # as a clone has it
    program = f"import subprocess\nsubprocess.run = lambda words, **_: print(words)\n{cell.source}"
    monkeypatch.delenv("PYTHONPATH", raising=False)
    # Without site packages, and so without this one; -c puts the working folder on the path, as a notebook does.
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    words = ast.literal_eval(done.stdout)
    assert words[1:4] == ["-m", "pip", "install"]
    # A path, since a bare name is looked for on the package index.
    assert words[-1].partition("[")[0] == str(tmp_path / "sscl_jax") and Path(words[-2]).is_absolute()


def test_all_four_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["method", "own_data", "quickstart", "tpu"]


@pytest.mark.end_to_end
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    for name, value in {"STEPS": 4, "PATIENTS": 7, "PATCH": 64, "WORK": tmp_path / "work"}.items():
        monkeypatch.setenv(f"SSCL_{name}", str(value))
    monkeypatch.setenv("PYTHONPATH", str(COLAB.parent))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(json.dumps(output) for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "report.html" in printed
    for cell in notebook.cells:
        if cell.cell_type == "code" and "plt.show()" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source


def test_versions_are_pinned_to_those_tried():
    setup = (COLAB.parent / "setup.py").read_text()
    required = setup[setup.index("install_requires") : setup.index("extras_require")]
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', required)
    lines = (COLAB / "constraints.txt").read_text().splitlines()[1:]
    assert [line.split("==") for line in lines] == [list(pair) for pair in bounds] and len(bounds) > 10
    assert all("colab/constraints.txt" in path.read_text() for path in NOTEBOOKS)
