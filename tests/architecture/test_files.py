"""Rules about files that no linter knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPONENTS = sorted((ROOT / "components").glob("*/component.py"))
STAGES = {
    "build_shards", "evaluate", "export_checkpoint", "plan_packs", "register_model", "resolve_recipe", "train",
    "validate_data",
}  # fmt: skip


def has_future_import(source: str) -> bool:
    return any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in ast.parse(source).body)


def test_every_component_is_there() -> None:
    """Without this, the rules below would hold for an empty folder."""
    assert {path.parent.name for path in COMPONENTS} == STAGES


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.parent.name)
def test_a_component_only_translates(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 40, "what a pod executes belongs into molmo2core.stages"
    assert (path.parent / "README.md").is_file()


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.parent.name)
def test_a_component_has_no_postponed_annotations(path: Path) -> None:
    """`from __future__ import annotations` makes KFP see strings for types; compilation breaks."""
    assert not has_future_import(path.read_text())


def test_the_rule_above_sees_the_import_it_bans() -> None:
    assert has_future_import('"""Doc."""\n\nfrom __future__ import annotations\n')


def test_the_graph_fits_on_two_pages() -> None:
    assert len((ROOT / "workflows" / "full_recipe.py").read_text().splitlines()) <= 120


def test_every_init_is_empty() -> None:
    """Code in __init__ runs on every import of anything below it: recipe would load what training needs."""
    files = [
        path for folder in ("molmo2core", "components", "workflows") for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert len(files) > 20
    assert [str(path.relative_to(ROOT)) for path in files if path.read_text().strip()] == []


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without __init__.py is not installed by setuptools, and no import contract sees it."""
    folders = {path.parent for name in ("molmo2core", "components") for path in (ROOT / name).rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
