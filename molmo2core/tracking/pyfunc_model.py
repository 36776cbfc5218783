"""The registered model as MLflow serves it: prompts in, text and points out; weights stay where they are.

MLflow stores the code file that calls `serve` (models-from-code: nothing is pickled) and `checkpoint_ref.json`, a few
hundred bytes that name the exported folder by address and digest.

Input columns: `prompt` (string); optional `images` (list of encoded images), `image_uris` (list of addresses) and
`video_uri`.  Output columns: `text`, and `points`: a list of {object, image_or_time, x, y} with x and y as fractions of
width and height.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd  # here, because MLflow resolves the type hints of predict

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

REFERENCE_ARTIFACT = "checkpoint_ref"
DEFAULT_NEW_TOKENS = 192


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of input."""

    prompt: str
    images: tuple[bytes, ...] = ()
    image_uris: tuple[str, ...] = ()
    video_uri: str = ""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One row of output."""

    text: str
    points: tuple[dict[str, float], ...]


Answerer = Callable[[Sequence[Request], int], list[Response]]
"""(requests, max_new_tokens) -> responses."""


def serve(load: Callable[[dict[str, Any]], Answerer]) -> None:
    """Make the calling file an MLflow model whose answers come from `load(checkpoint reference)`."""
    import mlflow

    class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
        def load_context(self, context: Any) -> None:
            self.answer = load(json.loads(Path(context.artifacts[REFERENCE_ARTIFACT]).read_text()))

        def predict(
            self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
        ) -> pd.DataFrame:
            requests = [_request(row) for row in model_input.to_dict(orient="records")]
            responses = self.answer(requests, int((params or {}).get("max_new_tokens", DEFAULT_NEW_TOKENS)))
            return pd.DataFrame({"text": [r.text for r in responses], "points": [list(r.points) for r in responses]})

    mlflow.models.set_model(ServedModel())


def signature() -> ModelSignature:
    """Columns and parameters, checked by MLflow at each call."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    point = Object([Property(name, DataType.double) for name in ("object", "image_or_time", "x", "y")])
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(DataType.string, "prompt"),
                ColSpec(Array(DataType.binary), "images", required=False),
                ColSpec(Array(DataType.string), "image_uris", required=False),
                ColSpec(DataType.string, "video_uri", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string, "text"), ColSpec(Array(point), "points")]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, DEFAULT_NEW_TOKENS)]),
    )


def _request(row: dict[str, Any]) -> Request:
    def given(name: str) -> Any:
        value = row.get(name)
        missing = value is None or (isinstance(value, float) and value != value)  # pandas' empty cell
        return () if missing else value

    return Request(
        prompt=row["prompt"],
        images=tuple(given("images")),
        image_uris=tuple(given("image_uris")),
        video_uri=given("video_uri") or "",
    )
