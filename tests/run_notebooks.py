"""Run the notebooks as their users do, all or those named, and store their outputs. `make notebooks` runs this program.

Each one runs in an empty folder, and imports hra_fx from a wheel of this tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
#: Without progress bars, which are of no use in a stored output, and what tqdm says where it cannot draw them.
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


def run(notebook: Any, folder: Path, **environment: str) -> None:
    """Execute a notebook in a folder; an error in a cell is raised."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=resources)
    client.execute(env=os.environ | QUIET | environment)


def without_noise(outputs: list[Any]) -> list[Any]:
    """Leave out what libraries log about this machine, and what %pip always says."""
    return [one for one in outputs if one.get("name") != "stderr" and "restart the kernel" not in one.get("text", "")]


def main(names: list[str]) -> None:
    """Run and store the notebooks with these names, or all."""
    with tempfile.TemporaryDirectory() as packages:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, str(ROOT)]
        subprocess.run(pip, check=True)
        for name in names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")):
            print(f"{name} ... ", end="", flush=True)
            began = time.perf_counter()
            notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
            with tempfile.TemporaryDirectory() as folder:
                run(notebook, Path(folder), PYTHONPATH=packages)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs = without_noise(cell.outputs)
            nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")
            print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
