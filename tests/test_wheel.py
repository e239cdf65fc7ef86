"""A wheel has every module, and works beside a user's own folder `passes`: ours is `hra_fx.passes`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_works_beside_a_folder_named_passes(tmp_path: Path) -> None:
    # pip builds in the folder of the sources, and would take what an earlier build left there.
    sources = tmp_path / "sources"
    for name in ("hra_fx", "passes"):
        shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (sources / "hra_fx" / "passes").unlink()
    (sources / "hra_fx" / "passes").write_text("../passes")  # what becomes of the link in a zip archive
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sources]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site-packages")
    assert {name.split("/")[0] for name in names} == {"hra_fx"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hra_fx").rglob("*.py")}
    modules |= {f"hra_fx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"hra_fx/py.typed", "hra_fx/view/page.html"} <= names

    user = tmp_path / "user"
    (user / "passes").mkdir(parents=True)
    (user / "passes" / "__init__.py").write_text("OWN = True\n")
    program = (ROOT / "tests" / "installed.py").read_text(encoding="utf-8")
    (user / "run.py").write_text(
        f"{program}\n    import passes\n\n    assert passes.OWN and not hasattr(passes, 'fold')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site-packages")}
    command = [sys.executable, "run.py"]
    done = subprocess.run(command, cwd=user, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"works in {tmp_path / 'site-packages'}" in done.stdout
