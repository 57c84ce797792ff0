"""Every notebook runs from top to bottom, and the invariants in its last cell hold."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")  # of the Jupyter libraries
def test_notebook_runs_and_its_invariants_hold(path: Path, tmp_path: Path) -> None:
    notebook = jupytext.read(path)
    (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("FAST = True"))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": ROOT}}).execute()
    assert "assert" in notebook.cells[-1].source
    assert any(out.output_type == "display_data" for cell in notebook.cells for out in cell.get("outputs", ()))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
