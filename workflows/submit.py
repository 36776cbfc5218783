"""Compile the pipeline, and hand it to a Kubeflow Pipelines server."""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp import Client, compiler
from kfp.pipeline_spec import pipeline_spec_pb2

from molmo2core.errors import PlatformError, RecipeError
from workflows.full_recipe import full_recipe


def compile_pipeline(output: Path, *, caching: bool = True) -> pipeline_spec_pb2.PipelineSpec:
    """Write the IR YAML, the same bytes each time, and return it as strictly parsed back.

    Args:
        output: the file to write.
        caching: False turns the server's cache off for every task, also inside loops (the client's own switch
            reaches only the outermost ones).
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(full_recipe, package_path=str(output))
    if not caching:
        documents = list(yaml.safe_load_all(output.read_text()))
        _disable_caching(documents[0])
        output.write_text(yaml.safe_dump_all(documents, sort_keys=True))
    return parse_strictly(output.read_text())


def parse_strictly(text: str) -> pipeline_spec_pb2.PipelineSpec:
    """The pipeline spec of an IR YAML; an unknown field is an error, as it is for the server."""
    document = next(iter(yaml.safe_load_all(text)))
    return json_format.ParseDict(document, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)


def check_arguments(spec: pipeline_spec_pb2.PipelineSpec, arguments: Mapping[str, Any]) -> None:
    """Check names before sending: the client accepts any, the server refuses late.

    Raises:
        RecipeError: an argument that the pipeline does not have, or a required one that is missing.
    """
    parameters = spec.root.input_definitions.parameters
    unknown = sorted(arguments.keys() - parameters.keys())
    missing = sorted(name for name, p in parameters.items() if not p.is_optional and name not in arguments)
    if unknown or missing:
        raise RecipeError(
            "pipeline arguments",
            found=f"unknown: {', '.join(unknown) or 'none'}; missing: {', '.join(missing) or 'none'}",
            expected=f"{', '.join(sorted(parameters))}",
        )


def submit(host: str, arguments: Mapping[str, Any], *, run_name: str, experiment: str, caching: bool = True) -> str:
    """Start a run on the server at `host`; return its address in the user interface.

    Raises:
        PlatformError: the server cannot be reached or refuses.
    """
    import kfp_server_api
    import urllib3

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the client's, about servers older than version 2
        package = Path(folder) / "full_recipe.yaml"
        check_arguments(compile_pipeline(package, caching=caching), arguments)
        try:
            run = Client(host=host).create_run_from_pipeline_package(
                str(package), arguments=dict(arguments), run_name=run_name, experiment_name=experiment
            )
        except (kfp_server_api.ApiException, urllib3.exceptions.HTTPError, OSError) as error:
            reason = getattr(error, "body", None) or error
            raise PlatformError(
                host, found=str(reason), expected="a Kubeflow Pipelines API", mend="check --host"
            ) from error
    return f"{host.rstrip('/')}/#/runs/details/{run.run_id}"


def _disable_caching(document: dict[str, Any]) -> None:
    dags = [document["root"]["dag"], *(c["dag"] for c in document["components"].values() if "dag" in c)]
    for dag in dags:
        for task in dag["tasks"].values():
            task["cachingOptions"] = {}
