"""Every notebook of notebooks/, found by walking: it runs from top to bottom in a fresh kernel, and keeps nothing of a run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CURE = "nbstripout --extra-keys 'metadata.kernelspec metadata.language_info.version'"

SHOWN = {
    "01_a_batch": "576 → 144",
    "02_ask_a_model": "has not learned to see",  # at nano size, and the notebook must say so
    "03_sweep_to_table": "cannot be compared with them",  # nano's scores with the paper's
    "04_a_projector_in_ten_lines": f"{6_295_552 + 5 * 2048:,}",  # pw2's at the paper's widths, and five a channel
}
"""A word that a notebook's outputs must hold, besides a plot and a table, which each has."""


def kept(path: Path) -> list[str]:
    """What a run or an editor left in a notebook."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    found = [f"metadata.{key}" for key in notebook.metadata if key != "language_info"]
    found += [f"metadata.language_info.{key}" for key in notebook.metadata.get("language_info", {}) if key == "version"]
    for number, cell in enumerate(notebook.cells):
        found += [f"cell {number}: metadata.{key}" for key in cell.metadata if key != "tags"]
        found += [f"cell {number}: {key}" for key in ("outputs", "execution_count") if cell.get(key)]
    return found


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, "the tests below walk an empty folder"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_of_a_run_is_kept(path: Path) -> None:
    """Outputs make every run a change, and tell of the machine."""
    assert not (found := kept(path)), f"{path.name} keeps {', '.join(found)}; cure: {CURE} notebooks/*.ipynb"


def test_the_cure_cures(tmp_path: Path) -> None:
    """What Jupyter leaves in a notebook that was run is found by the test above, and the command it names takes it out."""
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
    cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="/home/me\n")], 1
    cell.metadata["execution"] = {"iopub.status.idle": "2030-01-01T00:00:00Z"}
    notebook.metadata["kernelspec"] = {"display_name": "mine", "language": "python", "name": "mine"}
    notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
    nbformat.write(notebook, tmp_path / "run.ipynb")
    assert len(kept(tmp_path / "run.ipynb")) == 5
    subprocess.run([sys.executable, "-m", *shlex.split(CURE), str(tmp_path / "run.ipynb")], check=True)
    assert kept(tmp_path / "run.ipynb") == []
    again = nbformat.read(tmp_path / "run.ipynb", as_version=4)
    assert [cell.source for cell in again.cells] == [cell.source for cell in notebook.cells]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, nano_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a copy of the repository, so that no run is left in this one; an error in any cell is raised here."""
    from nbclient import NotebookClient

    there = [ROOT / name for name in ("conf", "notebooks", "results", "src", "sweeps")]
    for folder in filter(Path.is_dir, there):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MVLM_CACHE", str(nano_cache))

    notebook = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("from mvlm.cli import ROOT\n\nstr(ROOT)"))
    where = {"metadata": {"path": str(tmp_path / "notebooks")}}
    limits = {"timeout": 600, "startup_timeout": 600}  # of a cell, in seconds: for what hangs, not for what is slow
    NotebookClient(notebook, resources=where, **limits).execute()

    # A value is one message; what is printed comes in as many as the kernel's clock makes of it.
    values = [
        output["data"]["text/plain"] for output in notebook.cells[-1].outputs if output.output_type == "execute_result"
    ]
    assert values == [repr(str(tmp_path))], "the code that ran is the copy's"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [data for output in outputs for data in output.get("data", {}).items()]
    assert {"image/png", "text/html"} <= {kind for kind, _ in shown}
    assert SHOWN.get(path.stem, "") in "".join(content for kind, content in shown if kind == "text/html")
