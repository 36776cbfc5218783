"""images/: each image holds what its components import, from the lock, and no more than its extra asks for."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from functools import cache
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from components.images import IMAGES

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STAGE_OF_COMPONENT = re.compile(r"from molmo2core\.stages import (\w+)|from molmo2core\.stages\.(\w+) import")


def pins(name: str = "requirements.lock") -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line]
    return {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in requirements}


LOCK = {name: specifier.removeprefix("==") for name, specifier in pins().items()}
OVERRIDDEN = set(pins("requirements.overrides"))


def closure(image: str) -> dict[str, str]:
    """Distribution -> the version in the lock, of everything that the image's extra needs; checks it on the way.

    Follows the metadata of the installed distributions, so it needs no index.
    """
    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    wanted += [Requirement(line) for line in PROJECT["optional-dependencies"].get(image, [])]
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        assert name in LOCK, f"{image} needs {requirement}, which is not in requirements.lock"
        if name not in OVERRIDDEN:
            assert requirement.specifier.contains(LOCK[name], prereleases=True), f"{requirement} against {LOCK[name]}"
        found[name] = LOCK[name]
        for extra in {"", *requirement.extras}:
            if (name, extra) not in done:
                done.add((name, extra))
                wanted += requirements_of(name, extra)
    return found


@cache
def requirements_of(name: str, extra: str) -> list[Requirement]:
    requirements = [Requirement(line) for line in importlib.metadata.requires(name) or ()]
    return [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": extra})]


def image_of_component(path: Path) -> str:
    (image,) = re.findall(r'IMAGES\["(\w+)"\]', path.read_text())
    return str(image)


COMPONENTS = sorted((ROOT / "components").glob("*/component.py"))


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_an_image_resolves_within_the_lock(image: str) -> None:
    """Would catch a lock made for one extra only, and a pin that a dependency of the extra refuses."""
    assert len(closure(image)) > 10


def test_images_hold_no_more_than_they_need() -> None:
    """kfp's own pins must not meet Composer's, and the core image is pulled for work of seconds."""
    for image in IMAGES:
        assert not {"kfp", "kubeflow", "pytest"} & set(closure(image)), image
    assert not {"torch", "mlflow", "mosaicml", "transformers"} & set(closure("core"))


def test_the_environment_is_the_lock() -> None:
    """closure() reads installed metadata; it must be that of the pinned versions."""
    other = {name: importlib.metadata.version(name) for name in LOCK if importlib.metadata.version(name) != LOCK[name]}
    assert other == {}


def missing_libraries(stage: str, image: str) -> set[str]:
    """Modules of other distributions that `stage` may import, also inside functions, and `image` does not hold."""
    graph = grimp.build_graph("molmo2core", include_external_packages=True, exclude_type_checking_imports=True)
    homes, present = importlib.metadata.packages_distributions(), set(closure(image))
    return {
        module
        for module in graph.find_upstream_modules(f"molmo2core.stages.{stage}")
        if (distributions := homes.get(module.partition(".")[0]))
        and not module.startswith("molmo2core")
        and not {canonicalize_name(each) for each in distributions} & present
    }


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: path.parent.name)
def test_what_a_component_imports_is_in_its_image(path: Path) -> None:
    """Would catch an import that works here, where everything is installed, and fails in the pod."""
    stages = {first or second for first, second in STAGE_OF_COMPONENT.findall(path.read_text())}
    assert stages, "the component calls no stage"
    assert {stage: missing_libraries(stage, image_of_component(path)) for stage in stages} == {s: set() for s in stages}


def test_a_library_that_is_not_in_the_image_is_seen() -> None:
    assert {"torch", "streaming", "composer", "mlflow"} <= missing_libraries("train", "core")


@pytest.mark.parametrize("image", sorted(IMAGES))
def test_a_containerfile_installs_its_own_extra_from_the_lock_and_runs_without_root(image: str) -> None:
    lines = (ROOT / "images" / image / "Containerfile").read_text()
    assert ("--extra " + image in lines) == (image in PROJECT["optional-dependencies"])
    assert lines.count("--extra ") <= 1
    assert "--constraints requirements.lock --overrides requirements.overrides" in lines
    assert "--no-deps \"$(grep '^kfp==' requirements.lock)\"" in lines
    assert re.findall(r"^USER (\d+)", lines, re.MULTILINE)[-1] != "0"
    assert "--no-cache " in lines and "--no-cache-dir" in lines


def test_all_images_come_from_one_base_pinned_by_digest() -> None:
    files = sorted((ROOT / "images").glob("*/Containerfile"))
    assert {path.parent.name for path in files} == set(IMAGES)
    bases = {line for path in files for line in path.read_text().splitlines() if line.startswith("ARG BASE_IMAGE=")}
    assert len(bases) == 1
    assert re.fullmatch(r"ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}", bases.pop())


def test_the_tag_of_the_images_is_the_version_of_the_library() -> None:
    assert all(f":{PROJECT['version']}" in reference for reference in IMAGES.values())


def test_every_line_of_the_digest_table_names_an_image_and_a_digest() -> None:
    lines = (ROOT / "images" / "digests.lock").read_text().splitlines()
    entries = [line.split() for line in lines if line.strip() and not line.startswith("#")]
    assert all(name in IMAGES and re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for name, digest in entries)
