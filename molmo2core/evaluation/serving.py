"""Free prompts on images or a video, answered by an exported model: what the registered model does when served."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.annotations import Conversation, MediaKind, Turn
from molmo2core.errors import CheckpointError, DataError
from molmo2core.evaluation.inference import InferenceModel, load_inference_model
from molmo2core.examples import Example, Media
from molmo2core.manifest.measure import measure_file
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.preprocessing.points import parse_tags
from molmo2core.tracking.pyfunc_model import Answerer, Request, Response

_BATCH_SIZE = 8


def load_answerer(checkpoint: Mapping[str, Any]) -> Answerer:
    """Load the exported folder that a registered version names.

    Args:
        checkpoint: `uri` and `digest` of the folder, `preprocessing`: the limits of a PreprocessingConfig.

    Raises:
        CheckpointError: the folder is not the one that was registered, or is incomplete.
        DataError: there is no such folder.
    """
    uri, found = checkpoint["uri"], storage.open_committed(checkpoint["uri"]).digest
    if found != checkpoint["digest"]:
        raise CheckpointError(uri, found=f"digest {found}", expected=checkpoint["digest"], mend="restore the export")
    with tempfile.TemporaryDirectory() as cache:
        folder = storage.fetch_committed(uri, Path(cache))
        model = load_inference_model(folder, PreprocessingConfig(**checkpoint["preprocessing"]))

    def answer(requests: Sequence[Request], max_new_tokens: int) -> list[Response]:
        return answer_requests(model, requests, max_new_tokens)

    return answer


def answer_requests(model: InferenceModel, requests: Sequence[Request], max_new_tokens: int) -> list[Response]:
    """Greedy answers, with the points and tracks in them.

    Raises:
        DataError: a medium is missing or does not decode, or a request names images and a video.
    """
    prompts = [model.prompt(_example(request, f"request {n}"), 0) for n, request in enumerate(requests, start=1)]
    texts = model.answer(prompts, batch_size=_BATCH_SIZE, max_new_tokens=max_new_tokens)
    return [Response(text=text, points=tuple(_points(text))) for text in texts]


def _example(request: Request, where: str) -> Example:
    turns = (Turn(role="user", text=request.prompt), Turn(role="assistant", text=""))
    return Example(
        uid=where,
        dataset="served",
        split="test",
        media=_media(request, where),
        annotations=(Conversation(task="text", turns=turns),),
    )


def _media(request: Request, where: str) -> Media:
    images = (*request.images, *(storage.read_bytes(uri) for uri in request.image_uris))
    if request.video_uri and images:
        raise DataError(where, found="images and a video", expected="one or the other")
    kinds: dict[int, MediaKind] = {0: "none", 1: "image"}
    kind = "video" if request.video_uri else kinds.get(len(images), "images")
    files = (storage.read_bytes(request.video_uri),) if request.video_uri else images
    sizes, duration, fps = [], 0.0, 0.0
    for content in files:
        facts = measure_file(content, kind)
        if facts.size is None:
            raise DataError(where, found=f"{facts.fault}: {facts.details}", expected="a complete image or video")
        sizes.append(facts.size)
        duration, fps = facts.duration_seconds, facts.fps
    return Media(kind=kind, files=files, sizes=tuple(sizes), duration_seconds=duration, fps=fps)


def _points(text: str) -> list[dict[str, float]]:
    return [
        {"object": float(point.object_id), "image_or_time": point.index, "x": point.x, "y": point.y}
        for tag in parse_tags(text)
        for point in tag.points
    ]
