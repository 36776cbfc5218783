"""The import contract of ARCHITECTURE.md, and what must stay light."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    "molmo2core.recipe.load",
    "molmo2core.recipe.schema",
    "molmo2core.recipe.sections",
    "molmo2core.recipe.check",
]


def lint_imports(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_import_contract_holds() -> None:
    run = lint_imports()
    assert run.returncode == 0, run.stdout
    assert " 0 broken" in run.stdout


def test_the_contract_names_every_part_of_the_library() -> None:
    """A new package that no layer names would be free to import anything."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    named = {name.strip() for layer in contract["layers"] for name in layer.replace(":", "|").split("|")}
    parts = {
        f"molmo2core.{path.stem}"
        for path in (ROOT / "molmo2core").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert parts - {"molmo2core.__init__", "molmo2core.testing"} == named - {"components", "workflows"}


def test_the_contract_finds_an_import_upwards(tmp_path: Path) -> None:
    """The checker itself, on a small library that breaks the rule of layers."""
    package = tmp_path / "small"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "low.py").write_text("def f():\n    import small.high\n")
    (package / "high.py").touch()
    (tmp_path / ".importlinter").write_text(
        "[importlinter]\nroot_package = small\n"
        "[importlinter:contract:1]\nname = layers\ntype = layers\nlayers =\n    small.high\n    small.low\n"
    )
    run = lint_imports(cwd=tmp_path)
    assert run.returncode == 1
    assert "small.low is not allowed to import small.high" in run.stdout


@pytest.mark.parametrize("module", MODULES)
def test_reading_a_recipe_loads_no_heavy_library(module: str) -> None:
    """resolve_recipe runs in the image without torch, and a wrong key must be found in a moment."""
    program = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'streaming', 'composer', 'transformers', 'mlflow', 'kfp', 'great_expectations', 'boto3'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
