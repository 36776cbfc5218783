"""`python -m molmo2core.loading inspect`: what it prints and draws is what training gets."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from molmo2core.annotations import Point, Pointing, QuestionAnswer
from molmo2core.examples import DOCUMENT, ROOT, Deviation, Example, Media
from molmo2core.loading.inspection import PackView, crop_pixels, mask_picture, view_pack
from molmo2core.loading.inspection_page import build_page
from molmo2core.loading.inspection_text import describe, visible
from molmo2core.message_tree.attention_rule import allowed
from molmo2core.packing.plan import ENTRY, PackPlan
from molmo2core.packing.plan_files import read_plan
from molmo2core.preprocessing.config import HighRes, PreprocessingConfig
from molmo2core.preprocessing.image import patches
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import PlanSection, ShardSection, ValidateSection
from molmo2core.references import PackPlanRef, ShardsRef, read_reference
from molmo2core.shards.reader import ExampleReader
from molmo2core.stages import inspect_data, plan, resolve, shard, validate
from molmo2core.testing.loading import (
    GEOMETRY,
    PACKING,
    PREPROCESSOR,
    LoadingData,
    open_loading_data,
    tiny_loader,
    write_loading_data,
)
from molmo2core.testing.tiny_examples import write_tiny_shards

RECIPE = Path(__file__).parents[2] / "workflows" / "recipes" / "tiny.yaml"
SIZES = "data.shapes={images: 20, image_sets: 4, videos: 12, texts: 5, vocab_size: 768}"
DATASETS = ("captions", "image_pointing", "image_qa", "text", "tracking", "video_pointing", "video_qa")


@dataclass(frozen=True)
class Workspace:
    """The tiny recipe's data and plan, made by the real stages; and the arguments that name its recipe."""

    folder: Path
    recipe: tuple[str, ...]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    folder = tmp_path_factory.mktemp("workspace")
    overrides = [f"workspace={folder}", SIZES, "train.sft.steps=2"]
    sections = resolve.run(RECIPE.read_text(), overrides=overrides)
    validate.run(from_json(sections["validate"], ValidateSection), output=folder / "manifests.json")
    outputs = [folder / f"{dataset}.json" for dataset in DATASETS]
    for dataset, output in zip(DATASETS, outputs, strict=True):
        section = from_json(sections["shard"], ShardSection)
        shard.run(section, manifests=folder / "manifests.json", dataset=dataset, output=output)
    plan.run(from_json(sections["plan_sft"], PlanSection), shards=outputs, output=folder / "plan.json")
    given = [argument for override in overrides for argument in ("--set", override)]
    return Workspace(folder, ("--recipe", str(RECIPE), "--stage", "sft", *given))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LoadingData:
    folder = tmp_path_factory.mktemp("data")
    write_loading_data(folder)
    return open_loading_data(folder)


def inspect(*arguments: str, html: Path) -> int:
    return inspect_data.main(["inspect", *arguments, "--html", str(html)])


class Page(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_plan_is_shown_as_training_gets_it(workspace: Workspace, tmp_path: Path) -> None:
    """The command itself, in a process of its own.  Catches a view of other packs than the plan's, and a page that
    needs other files or the network."""
    command = [sys.executable, "-m", "molmo2core.loading", "inspect", str(workspace.folder / "plan.json")]
    run = subprocess.run(
        [*command, *workspace.recipe, "--count", "3", "--html", str(tmp_path / "page.html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    reference = read_reference(workspace.folder / "plan.json", PackPlanRef)
    planned = read_plan(Path(reference.uri))
    shown = re.findall(r"^  example \d+: \S+ \(sample (\d+), epoch (\d+)", run.stdout, re.MULTILINE)
    entries = [entry for index in range(3) for entry in planned.pack(index)]
    assert [(int(sample), int(epoch)) for sample, epoch in shown] == [(e["sample"], e["epoch"]) for e in entries]
    assert f"pack 2 of {len(planned)}: " in run.stdout
    turns = r"prompt: <\|im_start\|>user\\n.*<\|im_end\|>\\n<\|im_start\|>assistant\\n\n      reply: .*<\|im_end\|>\n"
    assert re.search(turns, run.stdout)
    page = Page((tmp_path / "page.html").read_text())
    assert page.addresses and all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in (tmp_path / "page.html").read_text()
    crops = sum(int(number) for number in re.findall(r"\), (\d+) crops \(bound", run.stdout))
    assert page.tags.count("figure") == crops > 0
    assert page.tags.count("img") == crops + 3, "a mask for each pack"


def test_a_reader_that_has_had_enough_is_no_error(workspace: Workspace, tmp_path: Path) -> None:
    """`inspect ... | head`.  Catches "internal error: BrokenPipeError" with a stack trace below it."""
    command = [sys.executable, "-m", "molmo2core.loading", "inspect", str(workspace.folder / "plan.json")]
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [*command, *workspace.recipe, "--html", str(tmp_path / "page.html")],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("plan.json", "--pack", "7", "--pack", "0"), r"pack 7 of 12: .*pack 0 of 12: "),
        (("plan.json", "--uid", "image_pointing-000001"), r"-000001: in \d+ packs: .*/image_pointing-000001 \(sample"),
        (("image_qa.json", "--uid", "image_qa/image_qa-000002"), r"alone: 1 examples, .*image_qa/image_qa-000002"),
        (("image_qa.json", "text.json", "--count", "1"), r"pack 0, planned just now: [2-9] examples, "),
        (("video_qa.json", "--split", "validation", "--count", "1"), r"sample 0, alone: .*video \d+ x \d+, "),
        ((), r"pack 3 of 12: "),
    ],
)
def test_ways_to_name_a_pack_or_a_sample(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], printed: str
) -> None:
    """Without any data, the plan and shards in the recipe's workspace."""
    named = [str(workspace.folder / word) if word.endswith(".json") else word for word in arguments]
    assert inspect(*named, *workspace.recipe, html=tmp_path / "page.html") == 0
    assert re.search(printed, capsys.readouterr().out, re.DOTALL)


def test_shards_alone_do(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the tokenizer that they were built with, or one that is named as people name folders.  Catches a command
    that needs a recipe to look at a file, and `--tokenizer corpus/tokenizer` that is looked for below /."""
    monkeypatch.chdir(workspace.folder)
    assert inspect("tracking.json", "--count", "1", html=tmp_path / "page.html") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("pack 0, planned just now: ")
    assert inspect("tracking.json", "--count", "1", "--tokenizer", "corpus/tokenizer", html=tmp_path / "page.html") == 0
    assert capsys.readouterr().out == printed
    (workspace.folder / "corpus" / "tokenizer").rename(workspace.folder / "corpus" / "gone")
    try:
        assert inspect("tracking.json", html=tmp_path / "page.html") == 2
    finally:
        (workspace.folder / "corpus" / "gone").rename(workspace.folder / "corpus" / "tokenizer")
    assert "corpus/tokenizer: no such folder" in capsys.readouterr().err


def test_folders_do_as_well_as_references(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(path.parent) for path in workspace.folder.glob("shards/*/*/_SUCCESS.json")]
    plans = [str(path.parent) for path in workspace.folder.glob("plans/sft/*/_SUCCESS.json")]
    printed = []
    for named in ([*plans, *folders], [str(workspace.folder / "plan.json")]):
        assert inspect(*named, *workspace.recipe, html=tmp_path / "page.html") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "RecipeError: inspect: neither data nor a recipe"),
        (("plan.json",), 2, "by the released defaults; to mend it: give the recipe and stage"),
        (("plan.json", "RECIPE", "--pack", "12"), 2, "DataError: --pack: 12; expected 0 to 11"),
        (("text.json", "RECIPE", "--pack", "1"), 2, "shards without a plan; to mend it: name a plan"),
        (("text.json", "RECIPE", "--uid", "nobody"), 2, "DataError: nobody: no such sample in split train"),
        (("manifests.json", "RECIPE"), 2, "ManifestsRef; expected a PackPlanRef or a ShardsRef"),
        (("corpus.json", "RECIPE"), 2, "no committed folder"),
        (("plan.json", "RECIPE", "--split", "test"), 2, "--split: test; expected train"),
        (("plan.json", "RECIPE", "--set", "train.sft.packing.crop_budget=33"), 2, "give the recipe and stage that the"),
        (("plan.json", "RECIPE", "--tokenizer", "OTHER"), 2, "with which captions was measured"),
    ],
)
def test_what_is_missing_or_wrong_is_said(
    workspace: Workspace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    """Catches a stack trace where a person needs the next thing to type, and a page of a wrong recipe."""
    from molmo2core.sources.shapes_tokenizer import save_tokenizer
    from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

    save_tokenizer(tiny_tokenizer(800).backend, tmp_path / "other")
    named: list[str] = []
    for word in arguments:
        named += workspace.recipe if word == "RECIPE" else [word.replace("OTHER", str(tmp_path / "other"))]
    named = [str(workspace.folder / word) if word.endswith(".json") else word for word in named]
    assert inspect(*named, html=tmp_path / "page.html") == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "page.html").exists()


def view(data: LoadingData, index: int) -> tuple[Any, PackView]:
    loaded = tiny_loader(data).dataset.load(index)
    shown = view_pack(loaded, "pack", packing=PACKING, reader=data.reader, preprocessor=PREPROCESSOR)
    return loaded, shown


def test_the_tokens_shown_are_the_arrays_of_training(data: LoadingData) -> None:
    """Every token, weight and position of every pack of an epoch can be read back from the view.  Catches tokens shown
    in a wrong branch or role, weights one place off, and ends that are not there."""
    cut = 0
    for index in range(len(data.plan)):
        loaded, shown = view(data, index)
        ids, weights, positions = [], [], []
        for example in shown.examples:
            cut += example.part is not None
            for branch in (None, *example.branches):
                tokens = example.root if branch is None else branch.tokens
                spread = [token for token in tokens for _ in range(token.count)]
                assert {token.role for token in spread} <= ({"root"} if branch is None else {"prompt", "reply"})
                if branch is not None:
                    assert spread[-1].is_only_target and spread[-1].role == "reply"
                    assert sum(token.weight > 0 for token in spread) == branch.num_targets
                    assert branch.total_weight == pytest.approx(sum(token.weight for token in spread), rel=1e-6)
                    assert branch.turns[0][0] == "prompt" and branch.turns[-1][1].endswith("<|im_end|>")
                # The weight of a token stands at the position before it; the last root token predicts at weight 0.
                weights += [token.weight for token in spread][1:] + ([0.0] if branch is None else [])
                ids += [token.id for token in (spread if branch is None else spread[:-1])]
                starts = [(token.position, token.count) for token in tokens if not token.is_only_target]
                positions += [first + n for first, count in starts for n in range(count)]
            assert example.num_tokens <= example.bound[0] and example.num_crops <= example.bound[1]
        assert ids == loaded.pack.input_ids.tolist()
        assert weights == loaded.pack.loss_weights.astype(float).tolist()
        assert positions == loaded.pack.position_ids.tolist()
        assert shown.loss_weight == pytest.approx(sum(weights))
    assert cut, "a tree in parts"


def test_the_mask_is_the_rule(data: LoadingData) -> None:
    """Unscaled, the rule itself; scaled down, shares of it.  Catches rows and columns exchanged, and a picture that
    smooths a leak between examples away."""
    loaded, _ = view(data, 0)
    ids, visual = loaded.pack.subsegment_ids, loaded.pack.is_visual
    full = allowed(ids, visual)
    assert np.array_equal(mask_picture(ids, visual, len(ids)), 255 * full.astype(np.uint8))
    side = 37
    edges = np.linspace(0, len(ids), side + 1).astype(int)
    rows = (edges[:-1] + edges[1:]) // 2
    expected = [[255 * full[row, a:b].mean() for a, b in pairwise(edges)] for row in rows]
    assert np.abs(mask_picture(ids, visual, side) - np.array(expected)).max() <= 0.5 + 1e-3


def test_crops_are_put_together_again() -> None:
    """Catches patches in a wrong place, which would make good data look broken."""
    crop = np.random.default_rng(0).integers(0, 256, (GEOMETRY.crop_size, GEOMETRY.crop_size, 3), dtype=np.uint8)
    assert np.array_equal(crop_pixels(patches(crop, GEOMETRY), GEOMETRY), crop)


SPOT = (0.72, 0.31)


def spotted(size: tuple[int, int]) -> bytes:
    """A black picture with a white spot."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    x, y = round(SPOT[0] * size[0]), round(SPOT[1] * size[1])
    pixels[y - 6 : y + 7, x - 6 : x + 7] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def alone(example: Example, folder: Path, config: PreprocessingConfig) -> PackView:
    """A pack of one sample of a dataset of its own."""
    reference = write_tiny_shards([example], str(folder))
    reader = ExampleReader([reference], "train", folder / "cache")
    preprocessor = replace(PREPROCESSOR, config=config)
    entries = np.array([(0, 0, len(example.annotations), 0)], ENTRY)
    packing = replace(PACKING, sequence_tokens=10_000, crop_budget=100)
    planned = PackPlan(entries=entries, pack_offsets=np.array([0, 1]), packing=packing)
    plan_ref = PackPlanRef(uri="", digest="", stage="", num_packs=1, parents=(reference,))
    loader = tiny_loader(LoadingData(planned, plan_ref, reader), preprocessor=preprocessor, global_batch_packs=1)
    loaded = loader.dataset.load(0)
    return view_pack(loaded, "pack", packing=packing, reader=reader, preprocessor=preprocessor)


def test_points_of_the_reply_are_where_the_model_sees_them(tmp_path: Path) -> None:
    """On the low-resolution view and on every overlapping crop, of an image that was drawn for high resolution.
    Catches marks in the coordinates of the image instead of the crop, and crops that the tiling does not have."""
    size = (300, 200)
    example = Example(
        uid="spot",
        dataset="points",
        split="train",
        media=Media(kind="image", files=(spotted(size),), sizes=(size,)),
        annotations=(Pointing(task="image_pointing", label="spot", points=(Point(x=SPOT[0], y=SPOT[1]),)),),
    )
    config = PreprocessingConfig(max_crops=2, high_res=HighRes(datasets=("points",), probability=1.0, max_crops=12))
    shown = alone(example, tmp_path, config)
    (only,) = shown.examples
    assert only.high_res and len(only.visuals) > 6
    assert only.branches[0].unseen == ()
    marked = 0
    for visual in only.visuals:
        for mark in visual.marks:
            marked += 1
            side = GEOMETRY.crop_size
            x, y = min(side - 1, int(mark.x * side)), min(side - 1, int(mark.y * side))
            assert visual.pixels[y, x].min() > 200, visual.caption
        if not visual.marks:
            assert visual.pixels[8:-8, 8:-8].max() < 200, f"{visual.caption}: the spot is here, but no mark"
    assert 2 <= marked < len(only.visuals), "low resolution and at least one crop"


def test_points_on_what_is_not_shown_are_told(workspace: Workspace, tmp_path: Path) -> None:
    """A reply that points at a time without a frame teaches guessing.  Catches silence about it."""
    example = Example(
        uid="set",
        dataset="sets",
        split="train",
        media=Media(kind="images", files=(spotted((90, 60)),) * 2, sizes=((90, 60),) * 2),
        annotations=(
            Pointing(
                task="multi_image_pointing",
                label="spot",
                question="Where?",
                points=(Point(x=0.5, y=0.5, image=2), Point(x=0.5, y=0.5, image=3)),
            ),
        ),
    )
    shown = alone(example, tmp_path, PreprocessingConfig(max_crops=2))
    assert shown.examples[0].branches[0].unseen == ("2 at 3",)
    assert "points where nothing is shown: 2 at 3" in describe(shown)
    assert [len(visual.marks) for visual in shown.examples[0].visuals if "low" in visual.caption] == [0, 1]


def test_tracks_are_drawn_on_their_frames(workspace: Workspace) -> None:
    """On the rendered corpus, whose truth is exact: the track's colour is under every mark."""
    reference = read_reference(workspace.folder / "tracking.json", ShardsRef)
    section = from_json(
        resolve.run(RECIPE.read_text(), overrides=[f"workspace={workspace.folder}", SIZES])["plan_sft"], PlanSection
    )
    reader = ExampleReader([reference], "train", workspace.folder / "cache")
    data = LoadingData(
        PackPlan(
            entries=np.array([(0, 0, 1, 0)], ENTRY),
            pack_offsets=np.array([0, 1]),
            packing=replace(PACKING, sequence_tokens=5000, crop_budget=100),
        ),
        PackPlanRef(uri="", digest="", stage="", num_packs=1, parents=(reference,)),
        reader,
    )
    preprocessor = replace(PREPROCESSOR, geometry=section.geometry, config=section.preprocessing)
    loaded = tiny_loader(data, preprocessor=preprocessor, global_batch_packs=1).dataset.load(0)
    shown = view_pack(loaded, "pack", packing=PACKING, reader=reader, preprocessor=preprocessor)
    marked = [(visual, mark) for visual in shown.examples[0].visuals for mark in visual.marks]
    assert len(marked) >= 3
    for visual, mark in marked:
        side = len(visual.pixels)
        colour = visual.pixels[min(side - 1, int(mark.y * side)), min(side - 1, int(mark.x * side))]
        assert colour.max() > 100, f"{visual.caption}: nothing but the dark background under the mark"


def test_whatever_data_hold_is_escaped(tmp_path: Path) -> None:
    """Catches a page in which an annotation becomes markup."""
    nasty = "<script>alert(1)</script>\n\\n\x1b[2J"
    example = Example(
        uid="<b>uid</b>",
        dataset="texts",
        split="train",
        media=Media(kind="image", files=(spotted((60, 60)),), sizes=((60, 60),)),
        annotations=(QuestionAnswer(task="image_qa", question=nasty, answer=nasty),),
    )
    shown = alone(example, tmp_path, PreprocessingConfig(max_crops=1))
    deviation = Deviation(kind="replaced", pack=0, dataset="d", uid=nasty, why=nasty)
    text = build_page(nasty, [(nasty, nasty)], [replace(shown, deviations=(deviation,))])
    page = Page(text)
    assert not {"script", "b"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert visible(nasty) == "<script>alert(1)</script>\\n\\\\n\\x1b[2J"
    printed = describe(replace(shown, deviations=(deviation,)))
    assert f"replaced: {visible(nasty)}" in printed
    assert all(character.isprintable() or character == "\n" for character in printed)


def test_a_mask_of_a_long_sequence_is_small_and_quick() -> None:
    """36,864 tokens: the whole mask would take 1.4 GB.  Catches a picture that is made from it."""
    ids = np.repeat(np.arange(8, dtype=np.int32) * 100_000, 4608)
    picture = mask_picture(ids, np.zeros(len(ids), bool))
    assert picture.shape == (384, 384)
    assert picture.nbytes < 200_000


def test_the_page_carries_the_pictures(data: LoadingData) -> None:
    """The first mask of the page, decoded: black where a query sees a key.  Catches an inverted or empty picture."""
    _, shown = view(data, 0)
    text = build_page("t", [], [shown])
    png = base64.b64decode(re.findall(r"data:image/png;base64,([^\"]+)", text)[0])
    assert np.array_equal(255 - np.asarray(Image.open(io.BytesIO(png))), shown.mask)


def test_rows_of_the_mask_are_named(data: LoadingData) -> None:
    """Beside their middle.  Catches a name at another example's rows."""
    loaded, shown = view(data, 0)
    found = re.findall(
        r'<span class="of-(example|branch)" style="top:([\d.]+)%">([^<]+)<', build_page("t", [], [shown])
    )
    ids = loaded.pack.subsegment_ids
    assert [name for kind, _, name in found if kind == "example"] == [str(n) for n in range(len(shown.examples))]
    document = -1
    for kind, top, name in found:
        at = ids[int(float(top) / 100 * len(ids))]
        document += kind == "example"
        assert at // DOCUMENT == document
        if kind == "branch":
            assert at % DOCUMENT == (ROOT if name == "root" else int(name.removeprefix("branch ")))
    assert len({name for _, _, name in found}) > 2


def test_equal_tokens_of_a_reply_are_written_out(tmp_path: Path) -> None:
    """Catches a coordinate of 833 that reads "83 ×2"."""
    example = Example(
        uid="spot",
        dataset="points",
        split="train",
        media=Media(kind="image", files=(spotted((90, 60)),), sizes=((90, 60),)),
        annotations=(QuestionAnswer(task="image_qa", question="how many?", answer="7333"),),
    )
    page = build_page("t", [], [alone(example, tmp_path, PreprocessingConfig(max_crops=1))])
    assert "×" in page, "the patches of the root"
    assert "7333<|im_end|>" in Page(page).text
