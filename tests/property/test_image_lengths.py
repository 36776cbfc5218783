"""Bounds of image roots, from what validation measured, against the roots that loading builds.

Planning sees sizes and limits only.  An undershoot would make the loader meet a pack that does not fit.
"""

from __future__ import annotations

import io
from dataclasses import replace

from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from molmo2core.annotations import QuestionAnswer
from molmo2core.examples import ROOT, Example, Media
from molmo2core.manifest.measure import measure_file
from molmo2core.preprocessing.config import HighRes, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.lengths import root_bound
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
GEOMETRIES = [
    VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1)),
    VisualGeometry(crop_size=60, patch_size=6, overlap_margins=(1, 2), image_pooling=(3, 2)),
    VisualGeometry(crop_size=28, patch_size=14, overlap_margins=(0, 0), video_pooling=(2, 2)),
]
FORMATS = {
    "1": "PNG",
    "L": "PNG",
    "LA": "PNG",
    "P": "PNG",
    "RGB": "JPEG",
    "RGBA": "WEBP",
    "CMYK": "TIFF",
    "I;16": "PNG",
}


def encoded(width: int, height: int, mode: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    options = {"tiffinfo": {274: orientation}} if FORMATS[mode] == "TIFF" else {"exif": exif}
    Image.new(mode, (width, height)).save(stream, FORMATS[mode], **options)
    return stream.getvalue()


files = st.builds(
    encoded,
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    mode=st.sampled_from(sorted(FORMATS)),
    orientation=st.integers(1, 8),
)
configs = st.builds(
    PreprocessingConfig,
    max_crops=st.integers(1, 8),
    max_set_crops=st.integers(1, 24),
    max_images=st.just(6),
    thin_images=st.sampled_from(["as_trained", "as_released_processors"]),
    high_res=st.builds(
        HighRes, datasets=st.just(("d",)), probability=st.sampled_from([0.0, 0.5, 1.0]), max_crops=st.integers(1, 24)
    ),
)


@settings(max_examples=150, deadline=None)  # 10 ms each
@given(
    encodings=st.one_of(st.lists(files, min_size=1, max_size=1), st.lists(files, min_size=2, max_size=6)),
    config=configs,
    geometry=st.sampled_from(GEOMETRIES),
    dataset=st.sampled_from(["d", "e"]),
    seed=st.integers(0, 2**16),
)
def test_bounds_hold_and_are_tight(
    encodings: list[bytes], config: PreprocessingConfig, geometry: VisualGeometry, dataset: str, seed: int
) -> None:
    """Exact but for the bytes of `Image k`, and for high resolution, where both draws fit."""
    kind = "image" if len(encodings) == 1 else "images"
    facts = [measure_file(content, kind) for content in encodings]
    sizes = tuple(fact.size for fact in facts if fact.size)
    assert len(sizes) == len(encodings)
    media = Media(kind=kind, files=tuple(encodings), sizes=sizes)
    question = QuestionAnswer(task="image_qa", question="?", answer="!")
    example = Example(uid="u", dataset=dataset, split="train", media=media, annotations=(question,))
    preprocessor = Preprocessor(geometry=geometry, config=config, tokenizer=TOKENIZER, weighting="none", seed=seed)
    tokenized = preprocessor.tokenize(example, epoch=0)
    true_tokens, true_crops = int((tokenized.subsegment_ids == ROOT).sum()), len(tokenized.crops)

    def bound(limits: PreprocessingConfig, *, high_res: bool) -> tuple[int, int]:
        return root_bound(kind, sizes, 0.0, 0, geometry, limits, high_res=high_res)

    may_be_drawn = dataset in config.high_res.datasets
    tokens, crops = bound(config, high_res=may_be_drawn)
    assert true_tokens <= tokens and true_crops <= crops
    usual = bound(config, high_res=False)
    if kind == "images":
        assert (crops, tokens) == (true_crops, usual[0]) and tokens - len("Image 1") * len(sizes) <= true_tokens
        return
    high = bound(replace(config, max_crops=max(config.max_crops, config.high_res.max_crops)), high_res=False)
    possible = {0.0: {usual}, 0.5: {usual, high}, 1.0: {high}}[config.high_res.probability if may_be_drawn else 0.0]
    assert (true_tokens, true_crops) in possible
    assert (tokens, crops) == ((max(usual[0], high[0]), max(usual[1], high[1])) if may_be_drawn else usual)
    event(f"high resolution matters: {may_be_drawn and high != usual}")
