"""The two stages on real manifests, shards and plans, in a folder and behind S3."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from molmo2core import storage
from molmo2core.errors import DataError, PlatformError, RecipeError
from molmo2core.examples import Example
from molmo2core.manifest.schema import annotations_to_json
from molmo2core.packing.config import PackingConfig
from molmo2core.packing.plan_files import read_plan
from molmo2core.preprocessing.config import PreprocessingConfig, VisualGeometry
from molmo2core.preprocessing.preprocessor import Preprocessor
from molmo2core.recipe.load import to_json
from molmo2core.recipe.sections import PlanSection, ShardSection
from molmo2core.references import ManifestsRef, PackPlanRef, ShardsRef, read_reference, write_reference
from molmo2core.shards.config import ShardsConfig
from molmo2core.shards.mixture import MixtureGroup
from molmo2core.shards.reader import ExampleReader
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.special_tokens import load_tokenizer
from molmo2core.stages import plan, shard
from molmo2core.testing.tiny_examples import image_examples, text_examples
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

GEOMETRY = VisualGeometry(crop_size=54, patch_size=6, overlap_margins=(1, 1))
EXAMPLES = {
    "images": [*image_examples("images", 20), *image_examples("images", 3, split="test")],
    "texts": text_examples("texts", 8),
}


def manifest_rows(examples: Sequence[Example], workspace: str) -> bytes:
    """Validated rows; the media are written below `workspace`."""
    lines = []
    for example in examples:
        files = []
        for number, content in enumerate(example.media.files):
            files.append(storage.join(workspace, "corpus", "media", f"{example.uid}-{number}.jpg"))
            storage.write_bytes(files[-1], content)
        row = {
            "id": example.uid,
            "split": example.split,
            "media": {"kind": example.media.kind, "files": files},
            "annotations": json.loads(annotations_to_json(example.annotations)),
            "license": "CC0-1.0",
            "source": "test",
            "measured": {
                "sizes": example.media.sizes,
                "duration_seconds": 0.0,
                "sha256": [hashlib.sha256(content).hexdigest() for content in example.media.files],
            },
        }
        lines.append(json.dumps(row))
    return "\n".join(lines).encode()


class Workspace:
    """Validated manifests and a tokenizer in a workspace; references in a local folder."""

    def __init__(self, uri: str, references: Path) -> None:
        self.uri, self.references = uri, references
        self.section = ShardSection(
            workspace=uri, shards=ShardsConfig(shard_bytes=30_000), tokenizer="corpus/tokenizer"
        )
        save_tokenizer(tiny_tokenizer().backend, references / "tokenizer")
        for file in (references / "tokenizer").iterdir():
            storage.write_bytes(storage.join(uri, "corpus", "tokenizer", file.name), file.read_bytes())

        def fill(folder: Path) -> dict[str, str]:
            for name, examples in EXAMPLES.items():
                (folder / f"{name}.jsonl").write_bytes(manifest_rows(examples, uri))
            return {}

        folder = storage.commit_folder(storage.join(uri, "manifests", "k"), fill)
        self.manifests = references / "manifests.json"
        write_reference(
            ManifestsRef(uri=storage.join(uri, "manifests", "k"), digest=folder.digest, datasets=tuple(EXAMPLES)),
            self.manifests,
        )

    def shards(self) -> list[Path]:
        """Run the stage for every dataset."""
        outputs = [self.references / f"{name}.json" for name in EXAMPLES]
        for name, output in zip(EXAMPLES, outputs, strict=True):
            shard.run(self.section, manifests=self.manifests, dataset=name, output=output)
        return outputs

    def plan_section(self) -> PlanSection:
        """80 % images, 20 % text; a third group is off."""
        return PlanSection(
            workspace=self.uri,
            stage="sft",
            seed=3,
            mixture={
                "images": MixtureGroup(rate=0.4, datasets=("images",)),
                "texts": MixtureGroup(rate=0.1, datasets=("texts",)),
                "off": MixtureGroup(rate=0.0, datasets=("missing",)),
            },
            packing=PackingConfig(sequence_tokens=400, crop_budget=9, window=32),
            preprocessing=PreprocessingConfig(max_crops=2),
            geometry=GEOMETRY,
            num_packs=12,
        )


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A local workspace."""
    return Workspace(str(tmp_path / "ws"), tmp_path / "references")


def check_whole_road(workspace: Workspace, cache: Path) -> None:
    """Shards hold the examples; the plan's ids mean them; a second run reuses all."""
    outputs = workspace.shards()
    refs = [read_reference(path, ShardsRef) for path in outputs]
    assert [ref.num_samples for ref in refs] == [{"train": 20, "test": 3}, {"train": 8}]
    assert all(storage.exists(storage.join(ref.uri, "train", "index.json")) for ref in refs)  # on S3 too
    reader = ExampleReader(refs, "train", cache)
    train = [e for examples in EXAMPLES.values() for e in examples if e.split == "train"]
    assert [reader.example(index) for index in range(len(reader))] == train

    section, output = workspace.plan_section(), workspace.references / "plan.json"
    report = plan.run(section, shards=outputs[::-1], output=output)
    assert not report.reused
    assert report.metrics["examples_per_pack"] > 1.5
    assert 0 < report.metrics["token_fill"] <= 1
    made = read_reference(output, PackPlanRef)
    assert made.num_packs == 12
    assert [parent.dataset for parent in made.parents if isinstance(parent, ShardsRef)] == ["images", "texts"]
    assert "ManifestsRef" in {type(ancestor).__name__ for ancestor in made.ancestors()}
    packs = read_plan(storage.fetch_committed(made.uri, cache))
    preprocessor = Preprocessor(
        geometry=GEOMETRY,
        config=section.preprocessing,
        tokenizer=load_tokenizer(
            storage.fetch_folder(storage.join(workspace.uri, "corpus/tokenizer"), cache / "tokenizer")
        ),
        weighting="none",
        seed=0,
    )
    for number in range(12):
        made_tokens = [
            preprocessor.tokenize(
                reader.example(int(entry["sample"])),
                epoch=int(entry["epoch"]),
                branches=(int(entry["first_branch"]), int(entry["stop_branch"])),
            )
            for entry in packs.pack(number)
        ]
        assert sum(len(made.input_ids) for made in made_tokens) <= 400
        assert sum(len(made.crops) for made in made_tokens) <= 9
    shares = {name: facts["share"] for name, facts in made.facts["draws"].items()}
    assert shares == pytest.approx({"images": 0.8, "texts": 0.2}, abs=0.06)

    again = workspace.references / "again.json"
    assert shard.run(workspace.section, manifests=workspace.manifests, dataset="images", output=again).reused
    assert read_reference(again, ShardsRef).digest == refs[0].digest
    assert plan.run(section, shards=outputs, output=again).reused
    assert read_reference(again, PackPlanRef).digest == made.digest


def test_local_workspace(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches ids, order or reuse that break between the stages."""
    check_whole_road(workspace, tmp_path / "cache")
    printed = capsys.readouterr().out
    assert "build_shards.images: reused" in printed
    assert "plan_packs.sft: made" in printed
    assert "sft: 12 packs of 400 tokens and 9 crops" in printed


def test_s3_workspace(s3_bucket: str, tmp_path: Path) -> None:
    """The same behind a real S3 server: catches paths that are only local."""
    check_whole_road(Workspace(f"{s3_bucket}/some/prefix", tmp_path / "references"), tmp_path / "cache")


def test_same_content_elsewhere_has_the_same_key(tmp_path: Path) -> None:
    """Catches a key or digest that holds the workspace's address or a time."""
    references = []
    for name in ("one", "two"):
        workspace = Workspace(str(tmp_path / name), tmp_path / f"{name}-references")
        outputs = workspace.shards()
        plan.run(workspace.plan_section(), shards=outputs, output=tmp_path / f"{name}.json")
        references.append(
            [*(read_reference(p, ShardsRef) for p in outputs), read_reference(tmp_path / f"{name}.json", PackPlanRef)]
        )
    for first, second in zip(*references, strict=True):
        assert Path(first.uri).name == Path(second.uri).name
        assert first.digest == second.digest


def test_any_setting_of_the_plan_changes_its_key(workspace: Workspace, tmp_path: Path) -> None:
    """Catches a stale plan that is served for another seed, limit or mixture."""
    outputs = workspace.shards()
    base = workspace.plan_section()
    sections = [
        base,
        dataclasses.replace(base, seed=4),
        dataclasses.replace(base, num_packs=13),
        dataclasses.replace(base, packing=dataclasses.replace(base.packing, crop_budget=8)),
        dataclasses.replace(base, preprocessing=dataclasses.replace(base.preprocessing, max_crops=1)),
        dataclasses.replace(base, mixture={"texts": base.mixture["texts"]}),
    ]
    uris = set()
    for section in sections:
        plan.run(section, shards=outputs, output=tmp_path / "plan.json")
        uris.add(read_reference(tmp_path / "plan.json", PackPlanRef).uri)
    assert len(uris) == len(sections)


def test_a_lost_medium_names_its_row_and_leaves_no_shards(workspace: Workspace) -> None:
    """Catches a stack trace, and half-written shards that a later stage can see."""
    lost = EXAMPLES["images"][5].uid
    Path(workspace.uri, "corpus", "media", f"{lost}-0.jpg").unlink()
    with pytest.raises(DataError, match=rf"images\.jsonl:6: .*{lost}-0\.jpg: no such file"):
        shard.run(workspace.section, manifests=workspace.manifests, dataset="images", output=workspace.manifests)
    assert storage.list_files(storage.join(workspace.uri, "shards")) == []


def test_writers_are_not_part_of_the_key(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches shards that are built again because another machine has more cores."""
    refs = []
    for writers in (2, 1):
        shards = ShardsConfig(shard_bytes=3_000, writers=writers)
        section = dataclasses.replace(workspace.section, shards=shards)
        output = workspace.references / "images.json"
        report = shard.run(section, manifests=workspace.manifests, dataset="images", output=output)
        assert report.reused == (writers == 1)
        refs.append(read_reference(output, ShardsRef))
    assert refs[0].uri == refs[1].uri
    assert len([name for name in storage.list_files(refs[0].uri) if name.endswith(".mds")]) > 5
    assert storage.list_files(f"{refs[0].uri}.parts") == []


def test_a_medium_that_is_lost_later_leaves_what_was_finished(workspace: Workspace) -> None:
    """A medium that goes after all were seen: the row is named, and the next run reads only what is left."""
    media = sorted(Path(workspace.uri, "corpus", "media").glob("images-train-*"))
    section = dataclasses.replace(workspace.section, shards=ShardsConfig(shard_bytes=3_000, writers=1))
    lost = Path(workspace.uri, "corpus", "media", f"{EXAMPLES['images'][15].uid}-0.jpg")
    content = lost.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "file_sizes", lambda names: [os.path.getsize(name) for name in names] + lose(lost))
        with pytest.raises(DataError, match=rf"images\.jsonl:16: .*{lost.name}: no such file"):
            shard.run(section, manifests=workspace.manifests, dataset="images", output=workspace.references / "x.json")
    left = storage.list_files(storage.join(workspace.uri, "shards"))
    finished = [name for name in left if name.endswith(f"/{storage.MARKER}")]
    assert len(finished) > 2
    assert all(".parts/" in name for name in left)
    lost.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        read: list[str] = []
        original = storage.read_bytes
        patch.setattr(storage, "read_bytes", lambda uri: (read.append(uri), original(uri))[1])
        shard.run(section, manifests=workspace.manifests, dataset="images", output=workspace.references / "x.json")
    read_again = {Path(uri).name for uri in read} & {path.name for path in media}
    assert lost.name in read_again
    assert media[0].name not in read_again
    ref = read_reference(workspace.references / "x.json", ShardsRef)
    reader = ExampleReader([ref], "train", workspace.references / "cache")
    train = [example for example in EXAMPLES["images"] if example.split == "train"]
    assert [reader.example(number) for number in range(len(reader))] == train


def lose(path: Path) -> list[int]:
    path.unlink()
    return []


def test_a_manifest_that_was_never_validated_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    """Catches a KeyError, and shards of media that nobody has looked at."""
    content = storage.read_bytes(storage.join(workspace.uri, "manifests/k/texts.jsonl"))
    rows = [json.loads(line) for line in content.splitlines()]
    del rows[2]["measured"]

    def fill(folder: Path) -> dict[str, str]:
        (folder / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return {}

    folder = storage.commit_folder(storage.join(workspace.uri, "manifests", "raw"), fill)
    ref = ManifestsRef(uri=folder.uri, digest=folder.digest, datasets=("texts",))
    write_reference(ref, tmp_path / "raw.json")
    with pytest.raises(DataError, match=r"texts\.jsonl:3: a row without measured; expected a manifest made by"):
        shard.run(workspace.section, manifests=tmp_path / "raw.json", dataset="texts", output=tmp_path / "x.json")


def test_a_medium_that_changed_after_validation_is_refused(workspace: Workspace) -> None:
    """Catches shards named by checksums that their media do not have, to be reused for ever."""
    changed = Path(workspace.uri, "corpus", "media", f"{EXAMPLES['images'][5].uid}-0.jpg")
    changed.write_bytes(EXAMPLES["images"][6].media.files[0])
    with pytest.raises(DataError, match=rf"images\.jsonl:6: .*{changed.name} has changed since it was validated"):
        shard.run(workspace.section, manifests=workspace.manifests, dataset="images", output=workspace.manifests)


def test_wrong_inputs_are_named(workspace: Workspace, tmp_path: Path) -> None:
    """Catches an unknown dataset, a missing tokenizer, missing groups and mixed tokenizers that go unnoticed."""
    output = tmp_path / "x.json"
    with pytest.raises(DataError, match="no dataset videos; expected one of images, texts"):
        shard.run(workspace.section, manifests=workspace.manifests, dataset="videos", output=output)
    with pytest.raises(DataError, match="elsewhere: no such folder"):
        section = dataclasses.replace(workspace.section, tokenizer="elsewhere")
        shard.run(section, manifests=workspace.manifests, dataset="images", output=output)
    outputs = workspace.shards()
    section = workspace.plan_section()
    with pytest.raises(DataError, match=r"mixture\.texts: no training samples of texts"):
        plan.run(section, shards=outputs[:1], output=output)
    with pytest.raises(DataError, match="expected each dataset once"):
        plan.run(section, shards=[*outputs, outputs[0]], output=output)
    with pytest.raises(RecipeError, match="no group with a positive rate"):
        plan.run(dataclasses.replace(section, mixture={}), shards=outputs, output=output)
    ref = read_reference(outputs[1], ShardsRef)
    write_reference(dataclasses.replace(ref, tokenizer_digest="other"), outputs[1])
    with pytest.raises(DataError, match="2 different tokenizers"):
        plan.run(section, shards=outputs, output=output)
    with pytest.raises(DataError, match=r"images.* samples do not fit in a sequence, e\.g\. images-train-\d+ \(branch"):
        tiny = dataclasses.replace(section, packing=PackingConfig(sequence_tokens=90, crop_budget=9))
        write_reference(ref, outputs[1])
        plan.run(tiny, shards=outputs, output=output)
    assert not output.exists()


def test_unwritable_workspace_is_a_platform_error(workspace: Workspace, tmp_path: Path) -> None:
    """Catches a stack trace when there is no space (a file stands where the folder must go)."""
    outputs = workspace.shards()
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    section = dataclasses.replace(workspace.plan_section(), workspace=str(tmp_path / "other"))
    original = Path.open

    def open_full(path: Path, *arguments: Any, **options: Any) -> Any:
        return original(full if path.name == "entries.npy" else path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(PlatformError, match="No space left on device"):
            plan.run(section, shards=outputs, output=tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
    assert storage.list_files(str(tmp_path / "other")) == []


def test_stages_run_alone_and_print_errors_first(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a command line that differs from `run`, and a stack trace as the first line."""
    (tmp_path / "shard.json").write_text(to_json(workspace.section))
    (tmp_path / "plan.json").write_text(to_json(workspace.plan_section()))
    arguments = ["--section", str(tmp_path / "shard.json"), "--manifests", str(workspace.manifests)]
    outputs = []
    for name in EXAMPLES:
        outputs += ["--shards", str(tmp_path / f"{name}.json")]
        assert shard.main([*arguments, "--dataset", name, "--output", outputs[-1]]) == 0
    assert plan.main(["--section", str(tmp_path / "plan.json"), *outputs, "--output", str(tmp_path / "out.json")]) == 0
    assert read_reference(tmp_path / "out.json", PackPlanRef).num_packs == 12
    capsys.readouterr()
    shutil.rmtree(read_reference(tmp_path / "images.json", ShardsRef).uri)
    section = tmp_path / "other.json"
    section.write_text(to_json(dataclasses.replace(workspace.plan_section(), seed=99)))
    assert plan.main(["--section", str(section), *outputs, "--output", str(tmp_path / "out.json")]) == 2
    assert capsys.readouterr().err.startswith("DataError: ")
