"""Run the whole workflow here, compile it, or submit it to a Kubeflow Pipelines server.

    python -m workflows.run local   --recipe workflows/recipes/tiny.yaml
    python -m workflows.run compile --recipe workflows/recipes/molmo2_4b.yaml --output full_recipe.yaml
    python -m workflows.run submit  --recipe workflows/recipes/molmo2_4b.yaml --host https://kubeflow.example/pipeline

Exit codes: 0 done (local: and promoted), 2 an error that you can mend, 3 the gate refused the model,
75 worth another try, 1 a fault of this program.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from molmo2core.errors import Molmo2Error, PlatformError, RecipeError, exit_with_message
from molmo2core.recipe.check import check_recipe
from molmo2core.recipe.difference import difference_lines
from molmo2core.recipe.load import load_recipe, read_recipe
from molmo2core.recipe.memory import memory_lines
from molmo2core.recipe.schema import Recipe
from molmo2core.references import EvaluationRef
from molmo2core.storage import is_remote

EXIT_GATE_REFUSED = 3
MIN_FREE_BYTES = 1 << 30
"""A local run of tiny.yaml writes less; larger recipes find out about their own needs stage by stage."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit code."""
    options = _parser().parse_args(arguments)
    try:
        text = read_recipe(options.recipe)
        overrides = [*options.overrides, *_workspace_override(options)]
        recipe = load_recipe(text, overrides, where=str(options.recipe))
        check_recipe(recipe, where=str(options.recipe))
        _print_choices(recipe, load_recipe(text, where=str(options.recipe)))
        for line in memory_lines(recipe):
            print(line)
        if options.command == "compile":
            return _compile(options.output, recipe)
        if options.command == "submit":
            return _submit(options, recipe, text, overrides)
        return _run_local(recipe, text, overrides)
    except Molmo2Error as error:
        return exit_with_message(error)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        return exit_with_message(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflows.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, explanation in (
        ("local", "run everything on this machine"),
        ("compile", "write the pipeline as IR YAML"),
        ("submit", "start a run on a Kubeflow Pipelines server"),
    ):
        command = commands.add_parser(name, help=explanation)
        command.add_argument("--recipe", type=Path, required=True)
        command.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one value"
        )
        command.add_argument("--workspace", help="local folder or s3:// prefix, instead of the recipe's")
        if name == "compile":
            command.add_argument("--output", type=Path, required=True, metavar="FILE")
        if name == "submit":
            command.add_argument("--host", default=os.environ.get("KFP_HOST"), help="address; or KFP_HOST")
            command.add_argument("--no-cache", dest="caching", action="store_false", help="run every task again")
    return parser


def _workspace_override(options: argparse.Namespace) -> list[str]:
    """The workspace as an override; a local one made absolute, since steps may run in any folder."""
    workspace = (
        options.workspace
        or load_recipe(read_recipe(options.recipe), options.overrides, where=str(options.recipe)).workspace
    )
    if is_remote(workspace) or options.command != "local":
        return [f"workspace={json.dumps(workspace)}"] if options.workspace else []
    return [f"workspace={json.dumps(str(Path(workspace).expanduser().resolve()))}"]


def _print_choices(recipe: Recipe, written: Recipe) -> None:
    """What the overrides and the profile changed."""
    for line in difference_lines(written, recipe):
        print(f"set  {line}")
    if recipe.profile == "released_code":
        for topic, difference in recipe.not_reproduced.items():
            print(f"not reproduced  {topic}: {difference}")


def _run_local(recipe: Recipe, text: str, overrides: list[str]) -> int:
    from workflows.full_recipe import full_recipe
    from workflows.local_runner import TaskFailed, run_pipeline
    from workflows.summary import closing_lines, read_references

    root = Path(f"runs/{recipe.name}") if is_remote(recipe.workspace) else Path(recipe.workspace)
    root = (root / "kfp").resolve()
    check_writable(root.parent)
    if "python3" in f"{root} {recipe.workspace}":
        raise RecipeError("workspace", found=recipe.workspace, expected="a path without 'python3', which KFP replaces")
    print(f"{recipe.name}: {recipe.description}")
    print(f"{len(recipe.data.manifests)} datasets, three training stages, in {recipe.workspace}")
    print(f"every line of every step: {root / 'run.log'}")
    try:
        run = run_pipeline(full_recipe, {"recipe": text, "overrides": overrides}, root=root)
    except TaskFailed as failure:
        print(failure.message or f"no message; see {root / 'run.log'}", file=sys.stderr)
        print(f"failed in step {failure.task}; mend it and run the same command again", file=sys.stderr)
        return failure.exit_code if failure.exit_code in (2, 75) else 1
    references = read_references(run.folder)
    print("\n".join(closing_lines(references, recipe, seconds=run.seconds, peak_bytes=run.peak_bytes)))
    passed = all(reference.passed for reference in references if isinstance(reference, EvaluationRef))
    return 0 if passed else EXIT_GATE_REFUSED


def check_writable(folder: Path, min_free_bytes: int = MIN_FREE_BYTES) -> None:
    """Make `folder` and see that a run can write into it.

    Raises:
        PlatformError: it cannot be made or written, or there is too little space.
    """
    mend = "free space, or choose another folder with --workspace"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlatformError(str(folder), found=f"cannot write: {error.strerror}", mend=mend) from error
    free = shutil.disk_usage(folder).free
    if free < min_free_bytes:
        found, expected = (f"{number / 2**30:.2f} GiB" for number in (free, min_free_bytes))
        raise PlatformError(str(folder), found=f"{found} free", expected=f"at least {expected}", mend=mend)


def _compile(output: Path, recipe: Recipe) -> int:
    from workflows.submit import compile_pipeline

    check_writable(output.resolve().parent, 1 << 20)
    spec = compile_pipeline(output)
    print(f"{output}: pipeline {spec.pipeline_info.name}, {len(spec.root.dag.tasks)} tasks; {recipe.name} resolves")
    return 0


def _submit(options: argparse.Namespace, recipe: Recipe, text: str, overrides: list[str]) -> int:
    from workflows.submit import submit

    if not options.host:
        raise RecipeError(
            "--host", found="no address", expected="a Kubeflow Pipelines API", mend="set --host or KFP_HOST"
        )
    if not is_remote(recipe.workspace):
        raise RecipeError(
            "workspace",
            found=recipe.workspace,
            expected="an s3:// prefix: pods share no folder",
            mend="--workspace s3://bucket/prefix",
        )
    url = submit(
        options.host,
        {"recipe": text, "overrides": overrides},
        run_name=recipe.name,
        experiment=recipe.register.experiment,
        caching=options.caching,
    )
    print(f"submitted {recipe.name}: {url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
