"""Images of examples: how many crops where, image sets, high resolution, and bytes up to the vision encoder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from molmo2core.annotations import Pointing, QuestionAnswer
from molmo2core.errors import DataError
from molmo2core.examples import Example, Media
from molmo2core.loading.collator import collate_packs
from molmo2core.packing.concat import pack_examples
from molmo2core.preprocessing.config import HighRes, PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.image import choose_tiling, image_crops
from molmo2core.preprocessing.lengths import num_image_tokens
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.preprocessing.root import build_root, image_ids
from molmo2core.testing.pictures import encoded, noise
from molmo2core.testing.tiny_model import tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer
from molmo2core.training.config import DropoutConfig
from molmo2core.training.microbatch import MicrobatchMaker

TOKENIZER = tiny_tokenizer()
SPECIAL = TOKENIZER.special
GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
EVALUATION = PreprocessingConfig(max_crops=24, max_images=20)
TRAINING = PreprocessingConfig(max_crops=8, high_res=HighRes(datasets=("pointing",)))
HEIGHT, WIDTH = 150, 200
"""So large in the tiny geometry that limits of 4, 8 and 24 crops give different tilings."""
FILE = encoded(Image.fromarray(noise(HEIGHT, WIDTH)), "PNG")


def example(num_images: int = 1, dataset: str = "pointing", uid: str = "7") -> Example:
    kind = "image" if num_images == 1 else "images"
    annotations = (
        Pointing(task="image_pointing", label="circle"),
        QuestionAnswer(task="image_qa", question="Colour?", answer="red"),
    )
    media = Media(kind=kind, files=(FILE,) * num_images, sizes=((WIDTH, HEIGHT),) * num_images)
    return Example(uid=uid, dataset=dataset, split="train", media=media, annotations=annotations)


def preprocessor(config: PreprocessingConfig, seed: int = 0) -> Preprocessor:
    return Preprocessor(geometry=GEOMETRY, config=config, tokenizer=TOKENIZER, weighting="none", seed=seed)


def num_crops(max_crops: int) -> int:
    rows, columns = choose_tiling(HEIGHT, WIDTH, GEOMETRY, max_crops)
    return 1 + rows * columns


def test_layout_of_one_image() -> None:
    """model.md 4.2, written out: the low-resolution view has no column tokens."""
    start, patch, end = [SPECIAL.low_res_im_start], [SPECIAL.im_patch], [SPECIAL.im_end]
    rows, columns = 5, 8  # (1, 2) crops of 9 patches, 2 of them shared: 9 x 16 patches, pooled 2 x 2
    line = patch * columns + [SPECIAL.im_col]
    expected = start + patch * 25 + end + [SPECIAL.im_start] + line * rows + end
    found = image_ids((1, 2), GEOMETRY, SPECIAL)
    assert found.tolist() == expected and found.dtype == np.int32
    assert len(found) == num_image_tokens((1, 2), GEOMETRY)


@pytest.mark.parametrize(
    ("config", "num_images", "crops"),
    [
        (TRAINING, 1, 8),
        (TRAINING, 5, 8),
        (EVALUATION, 1, 24),
        (EVALUATION, 20, 8),
        (replace(TRAINING, max_crops=4), 2, 4),
    ],
)
def test_crops_of_each_image(config: PreprocessingConfig, num_images: int, crops: int) -> None:
    """24 crops belong to single images: a set of twenty would take 500 and fill any context (model.md 4.4)."""
    root = build_root(example(num_images), geometry=GEOMETRY, config=config, tokenizer=TOKENIZER)
    assert len(root.crops) == num_images * num_crops(crops)
    assert num_crops(4) < num_crops(8) < num_crops(24)


@pytest.mark.parametrize(("config", "fits"), [(TRAINING, 5), (EVALUATION, 20)])
def test_set_sizes(config: PreprocessingConfig, fits: int) -> None:
    """One more than the limit is an error, never silently cut."""
    build_root(example(fits), geometry=GEOMETRY, config=config, tokenizer=TOKENIZER)
    with pytest.raises(DataError, match=f"{fits + 1} images; expected at most {fits}"):
        build_root(example(fits + 1), geometry=GEOMETRY, config=config, tokenizer=TOKENIZER)


def test_images_of_a_set_are_numbered_and_one_is_not() -> None:
    """`Image k` without space or line break, only where there is more than one (model.md 4.2)."""
    config, tiling = TRAINING, choose_tiling(HEIGHT, WIDTH, GEOMETRY, 8)
    one = image_ids(tiling, GEOMETRY, SPECIAL).tolist()
    single = build_root(example(1), geometry=GEOMETRY, config=config, tokenizer=TOKENIZER)
    assert single.ids.tolist() == [SPECIAL.bos, *one]
    several = build_root(example(3), geometry=GEOMETRY, config=config, tokenizer=TOKENIZER)
    numbers = [TOKENIZER.encode_text(f"Image {k}") for k in (1, 2, 3)]
    assert several.ids.tolist() == [SPECIAL.bos, *(token for text in numbers for token in (*text, *one))]
    np.testing.assert_array_equal(several.crops[: len(single.crops)], single.crops)
    patches = len(single.crops) * GEOMETRY.num_patches
    first, second, _ = np.split(several.pooling, 3)
    np.testing.assert_array_equal(second, np.where(first >= 0, first + patches, first))


def drawn_crops(config: PreprocessingConfig, made: Example, epoch: int = 0, seed: int = 0) -> int:
    return len(preprocessor(config, seed).tokenize(made, epoch=epoch).crops)


def test_high_resolution_is_drawn_as_often_as_configured() -> None:
    """300 draws at 0.3: within 0.22 and 0.38 (three standard deviations); the next epoch draws anew."""
    by_uid = [drawn_crops(TRAINING, example(uid=str(n))) for n in range(150)]
    by_epoch = [drawn_crops(TRAINING, example(), epoch=n) for n in range(150)]
    assert set(by_uid) == set(by_epoch) == {num_crops(8), num_crops(24)}
    assert 0.22 < (np.array(by_uid + by_epoch) == num_crops(24)).mean() < 0.38
    assert by_uid[:20] == [drawn_crops(TRAINING, example(uid=str(n))) for n in range(20)], "a draw can be repeated"


def test_high_resolution_is_for_single_images_of_its_datasets_in_training() -> None:
    """At probability 1 whatever may be drawn is drawn."""
    always = replace(TRAINING, high_res=HighRes(datasets=("pointing",), probability=1.0))
    assert drawn_crops(always, example()) == num_crops(24)
    assert drawn_crops(always, example(dataset="captions")) == num_crops(8)
    assert drawn_crops(always, example(2)) == 2 * num_crops(8)
    prompt = preprocessor(always).tokenize_prompt(example(), 0)
    assert len(prompt.crops) == num_crops(8), "inference goes by max_crops alone"


def test_parts_of_a_split_tree_see_the_same_crops() -> None:
    """A tree that is cut between branches stands in two packs with the same image."""
    maker = preprocessor(TRAINING)
    both = set()
    for uid in map(str, range(12)):
        parts = [maker.tokenize(example(uid=uid), epoch=0, branches=part) for part in ((0, 1), (1, 2), (0, 2))]
        assert len({len(part.crops) for part in parts}) == 1
        both.add(len(parts[0].crops))
    assert len(both) == 2


def test_bytes_stay_bytes_until_the_vision_encoder() -> None:
    """Crops as floats would take four times the memory of a worker, its queue and the copy to the device."""
    model = tiny_model()
    made = replace(preprocessor(TRAINING), geometry=model.config.geometry).tokenize(example(), epoch=0)
    packed = pack_examples([made, made], model.config.geometry.max_pool)
    batch = collate_packs([packed])
    assert isinstance(batch, dict)
    maker = MicrobatchMaker(im_patch_id=SPECIAL.im_patch, dropout=DropoutConfig())
    microbatch = maker.make(batch["packs"])
    seen: list[torch.Tensor] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.encode_visual(microbatch["crops"], microbatch["pooling"])
    assert made.crops.dtype == packed.crops.dtype == np.uint8
    assert [crops.dtype for crops in (microbatch["crops"], *seen)] == [torch.uint8] * 2
    np.testing.assert_array_equal(seen[0].numpy(), np.concatenate([made.crops, made.crops]))


def test_crops_are_written_once() -> None:
    """A root of one image holds the array that `image_crops` filled, no copy of it."""
    pixels = noise(HEIGHT, WIDTH)
    crops = image_crops(pixels, choose_tiling(HEIGHT, WIDTH, GEOMETRY, 8), GEOMETRY)
    root = build_root(example(), geometry=GEOMETRY, config=TRAINING, tokenizer=TOKENIZER)
    np.testing.assert_array_equal(root.crops, crops)
    assert root.crops.base is None or root.crops.base.nbytes == root.crops.nbytes
