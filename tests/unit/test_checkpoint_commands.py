"""`python -m molmo2core.checkpoints`, as somebody runs it who has never seen it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from molmo2core import storage
from molmo2core.checkpoints import __main__ as commands
from molmo2core.checkpoints.reference import load_weights, save_weights
from molmo2core.checkpoints.weight_files import SINGLE, WeightFiles
from molmo2core.model.initialization import build_model
from molmo2core.model.molmo2 import Molmo2
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.local_hub import local_hub
from molmo2core.testing.tiny_model import Variant, tiny_config, tiny_model
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tiny_tokenizer().backend, folder)
    return folder


def saved(folder: Path, model: Molmo2) -> Path:
    folder.mkdir()
    save_weights(folder, model, model.config)
    return folder


def same_weights(left: Path, right: Path) -> bool:
    before, after = WeightFiles(left), WeightFiles(right)
    return before.tensors.keys() == after.tensors.keys() and all(
        torch.equal(before.read(name), after.read(name)) for name in before.tensors
    )


@pytest.mark.parametrize(("variant", "dtype"), [("qwen", "float32"), ("olmo", "bfloat16")])
def test_there_and_back(
    variant: Variant, dtype: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """export, verify, import: exact in float32; what was measured is printed, and what goes on meanwhile beside it."""
    weights, out, back = saved(tmp_path / "weights", tiny_model(3, variant)), tmp_path / "out", tmp_path / "back"
    export = ["export", str(weights), "--tokenizer", str(tokenizer), "--dtype", dtype, "--output", str(out)]
    assert commands.main(export) == 0
    assert storage.open_committed(str(out)).meta["logit_difference"] <= 1e-5
    printed = capsys.readouterr()
    assert "video: differs by at most" in printed.out and "same token ids" in printed.out
    assert "reading" in printed.err and "writing file 1" in printed.err
    assert commands.main(["verify", str(out), "--weights", str(weights)]) == 0
    assert capsys.readouterr().out.count("differs by at most") == 5
    assert commands.main(["import", str(out), "--output", str(back)]) == 0
    assert same_weights(weights, back) == (dtype == "float32")
    assert "parameters, float32" in capsys.readouterr().out


def test_verify_refuses_other_weights(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, others = saved(tmp_path / "weights", tiny_model(3)), saved(tmp_path / "others", tiny_model(4))
    out = str(tmp_path / "out")
    assert commands.main(["export", str(weights), "--tokenizer", str(tokenizer), "--output", out]) == 0
    assert commands.main(["verify", out, "--weights", str(others)]) == 2
    assert "differ by up to" in capsys.readouterr().err


def test_base_models_make_weights_to_start_from(tmp_path: Path, tokenizer: Path) -> None:
    """A vision encoder alone, exported with what it came from on its card.  (Real base models: test_base_models.)"""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision, geometry = tiny_config().vision_encoder, tiny_config().geometry
    sizes = {"hidden_size": vision.width, "intermediate_size": vision.mlp_width, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "image_size": geometry.crop_size, "patch_size": geometry.patch_size}
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(tmp_path / "siglip")
    base, out, exported = str(tmp_path / "siglip"), str(tmp_path / "out"), str(tmp_path / "exported")
    arguments = ["import", "--size", "tiny", "--vision-encoder", base, "--seed", "5", "--output"]
    assert commands.main([*arguments, out]) == 0
    found = load_weights(Path(out))
    assert torch.equal(found.connector.gate.weight, build_model(found.config, seed=5).connector.gate.weight)
    assert not torch.equal(
        found.vision_encoder.position_embedding, build_model(found.config, seed=5).vision_encoder.position_embedding
    )
    assert commands.main(["export", out, "--tokenizer", str(tokenizer), "--output", exported]) == 0
    card = (Path(exported) / "README.md").read_text()
    assert base in card and storage.open_committed(out).digest in card


def test_weights_in_an_object_store(tokenizer: Path, tmp_path: Path, s3_bucket: str) -> None:
    """What `import` committed there, `export` finds, though its files lie below the address."""
    model = tiny_model(3)
    exported, weights = str(tmp_path / "exported"), saved(tmp_path / "weights", model)
    assert commands.main(["export", str(weights), "--tokenizer", str(tokenizer), "--output", exported]) == 0
    remote, again = storage.join(s3_bucket, "weights"), storage.join(s3_bucket, "exported")
    assert commands.main(["import", exported, "--output", remote]) == 0
    assert commands.main(["export", remote, "--tokenizer", str(tokenizer), "--output", again]) == 0
    assert commands.main(["verify", again, "--weights", remote]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "nowhere", "--output", "new"], "DataError: ./nowhere: no such folder"),
        (["import", "allenai/Molmo2-4B", "--output", "new"], "DataError: .*written hf://allenai/Molmo2-4B"),
        (["import", "--output", "new"], "RecipeError: import: neither SOURCE nor a base model"),
        (["import", "--decoder", "x", "--output", "new"], "RecipeError: import: a base model without --size"),
        (["import", "y", "--size", "tiny", "--decoder", "x", "--output", "new"], "RecipeError: .*one or the other"),
        (["import", "weights", "--output", "new"], "CheckpointError: .*processor_config.json: no such file"),
        (["import", "weights", "--output", "weights"], "DataError: weights: files; expected a new folder"),
        (["export", "weights", "--tokenizer", "weights", "--output", "new"], "DataError: .*tokenizer.json: no such"),
        (["export", "tokenizer", "--tokenizer", "tokenizer", "--output", "new"], "CheckpointError: .*model_config"),
        (["verify", "weights", "--weights", "weights"], "DataError: .*tokenizer.json: no such file"),
    ],
)
def test_mistakes_are_messages(
    arguments: list[str],
    message: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First line says what, exit code says who; no trace, and nothing at the output."""
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "weights", tiny_model(3))
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert commands.main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]

    assert re.match(message, last), last
    assert sorted(path.name for path in tmp_path.iterdir()) == before


PROGRAM = """
import contextlib, io, json, os, sys
from huggingface_hub import constants
from molmo2core.checkpoints.__main__ import main
found = []
def run(source, output):
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        code = main(["import", source, "--output", output])
    found.append((code, printed.getvalue()))
run("hf://org/tiny@v1", "imported")
run("hf://org/tiny@v9", "x")
run("hf://org/none", "x")
constants.ENDPOINT = "http://127.0.0.1:9"
run("hf://org/other", "x")
constants.HF_HUB_OFFLINE = True
run("hf://org/other", "x")
print(json.dumps(found))
"""


def test_import_from_the_hub(tokenizer: Path, tmp_path: Path) -> None:
    """Through huggingface_hub, from a small server of its protocol: the revision that was asked for, and no file that
    an import does not read; unknown names, a hub that does not answer and offline mode are messages.  A process of its
    own, because huggingface_hub reads the environment once."""
    weights, exported = saved(tmp_path / "weights", tiny_model(3)), tmp_path / "exported"
    assert commands.main(["export", str(weights), "--tokenizer", str(tokenizer), "--output", str(exported)]) == 0
    for name in ("pytorch_model.bin", "modeling_molmo2.py", "onnx.safetensors"):
        (exported / name).write_bytes(b"never read")
    with local_hub({"org/tiny": exported}, ("v1",)) as (endpoint, asked):
        done, no_revision, no_repository, no_answer, offline = run_with_hub(PROGRAM, endpoint, tmp_path)
    assert done[0] == 0, done[1]
    assert same_weights(weights, tmp_path / "imported")
    assert sorted(asked) == [
        "config.json", SINGLE, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"
    ]  # fmt: skip
    for code, message in (no_revision, no_repository):
        assert code == 2 and "no such model or revision on the hub" in message
    for code, message in (no_answer, offline):
        assert code == 75 and "not in the local cache" in message and "give their folder" in message
    assert "HF_HUB_OFFLINE" in offline[1]
    assert all("Traceback" not in message for _, message in (no_revision, no_repository, no_answer, offline))


def run_with_hub(program: str, endpoint: str, folder: Path) -> Any:
    """What a process prints last, as JSON; it runs in `folder`."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(commands.__file__).parents[2]),
    }
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=folder)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


REMOTE_PROGRAM = """
import json
from transformers import AutoConfig
found = AutoConfig.from_pretrained("exported", trust_remote_code=True)
local = AutoConfig.from_pretrained("exported")
modules = [type(config).__module__ for config in (found, local)]
print(json.dumps([found.came_from, found.vit_config["num_hidden_layers"], *modules]))
"""


def test_remote_code_comes_from_the_released_repository(tokenizer: Path, tmp_path: Path) -> None:
    """`auto_map` names classes as `repository--module.Class`, so that loaders which trust remote code (vLLM, older
    transformers) fetch them from the hub, and an export carries no code that is not ours.  With transformers' own
    resolution, and a stand-in for the released file."""
    weights, exported = saved(tmp_path / "weights", tiny_model(3)), tmp_path / "exported"
    assert commands.main(["export", str(weights), "--tokenizer", str(tokenizer), "--output", str(exported)]) == 0
    assert not list(exported.glob("*.py"))
    released = tmp_path / "released"
    released.mkdir()
    (released / "configuration_molmo2.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class Molmo2Config(PretrainedConfig):\n"
        "    model_type = 'molmo2'\n"
        "    came_from = 'the hub'\n"
    )
    with local_hub({"allenai/Molmo2-8B": released}, ("main",)) as (endpoint, asked):
        came_from, layers, module, own = run_with_hub(REMOTE_PROGRAM, endpoint, tmp_path)
    assert came_from == "the hub" and "Molmo2" in module and layers == 4
    assert own.startswith("transformers.models.molmo2")
    assert asked == ["configuration_molmo2.py"]
