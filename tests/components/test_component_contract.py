"""What every component file must be: a signature, imports, one call (ARCHITECTURE; kubeflow.md 1)."""

import ast
from pathlib import Path

import pytest

from components.images import IMAGES
from workflows.full_recipe import full_recipe

COMPONENTS = sorted((Path(__file__).parents[2] / "components").glob("*/component.py"))
NAMES = [path.parent.name for path in COMPONENTS]


def test_the_eight_components_exist() -> None:
    assert NAMES == [
        "build_shards", "evaluate", "export_checkpoint", "plan_packs", "register_model", "resolve_recipe", "train",
        "validate_data",
    ]  # fmt: skip


@pytest.mark.parametrize("path", COMPONENTS, ids=NAMES)
def test_component_is_thin(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    tree = ast.parse(text)
    imported = {getattr(node, "module", None) or a.name for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names}  # fmt: skip
    assert "__future__" not in imported, "strings as annotations break KFP's compilation"
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.name == path.parent.name and ast.get_docstring(function)
    module_level = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    body_names = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    assert not module_level & body_names, "KFP ships the function alone: the body must import what it uses"


@pytest.mark.parametrize("path", COMPONENTS, ids=NAMES)
def test_component_is_documented(path: Path) -> None:
    readme = (path.parent / "README.md").read_text()
    function = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    for argument in function.args.args:
        assert f"`{argument.arg}`" in readme, f"{path.parent.name}/README.md does not explain `{argument.arg}`"


def test_images_come_from_the_table_and_kfp_is_not_installed_at_run_time() -> None:
    executors = full_recipe.pipeline_spec.deployment_spec["executors"]
    assert len(executors) >= 8
    for name, executor in executors.items():
        assert executor["container"]["image"] in IMAGES.values(), name
        assert "pip install" not in " ".join(executor["container"]["command"]), name


def test_images_are_pinned_never_latest() -> None:
    assert all(":" in image.rsplit("/", 1)[1] and not image.endswith(":latest") for image in IMAGES.values())
