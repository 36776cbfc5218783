"""How much memory reading, writing and verifying weights take, measured on a model of 206 MB in nine files.

A process of its own does the steps one after the other.  Before each it resets the kernel's high-water mark of resident
memory (`/proc/self/clear_refs`), so that `VmHWM - VmRSS before` is what the step added at its worst, mapped files
included.  The bounds are stated in models and files, not in what was measured; what was measured (x86, torch 2.7,
safetensors 0.8, transformers 5.23) stands beside each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SLACK = 30
"""MB: allocator, Python objects, and what transformers imports when it is first used."""

PROGRAM = '''
import json, sys
from dataclasses import replace
from pathlib import Path

import torch

from molmo2core.checkpoints.config import ExportConfig, InitialWeights
from molmo2core.checkpoints.export_hf import export_model
from molmo2core.checkpoints.import_hf import import_released, initial_model
from molmo2core.checkpoints.model_card import Lineage
from molmo2core.checkpoints.reference import load_weights, save_weights
from molmo2core.checkpoints.tensor_table import pairs
from molmo2core.checkpoints.verify import verify_export
from molmo2core.checkpoints.weight_files import WeightFiles, write_weights
from molmo2core.model.config import named_config
from molmo2core.model.initialization import build_model, empty_model
from molmo2core.preprocessing.config import PreprocessingConfig
from molmo2core.sources.shapes_tokenizer import save_tokenizer
from molmo2core.testing.tiny_tokenizer import tiny_tokenizer

folder = Path(sys.argv[1])
tiny = named_config("tiny")
config = replace(tiny, decoder=replace(
    tiny.decoder, width=1024, num_layers=9, num_heads=16, num_kv_heads=4, head_dim=64, mlp_width=1024
))
found = {}


def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(name, step):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = step()
    found[name] = status("VmHWM") - before
    return result


def write_base(model):
    """As a Qwen3 file: fused matrices apart, and without new tokens, connector and vision encoder."""
    state, head = model.state_dict(), config.decoder.head_dim
    sizes = [config.decoder.num_heads * head] + 2 * [config.decoder.num_kv_heads * head]
    def tensors():
        for theirs, ours in pairs(config, "qwen3"):
            rows = {3: sizes, 2: 2 * [config.decoder.mlp_width], 1: [len(state[ours[0]])]}[len(theirs)]
            yield from zip(theirs, state[ours[0]].split(rows))
    write_weights(folder / "base", tensors(), shard)
    (folder / "base" / "config.json").write_text(json.dumps({
        "model_type": "qwen3", "num_hidden_layers": config.decoder.num_layers, "num_attention_heads": 16,
        "rms_norm_eps": config.decoder.norm_eps, "hidden_act": "silu", "rope_theta": config.decoder.rope_theta,
    }))


def naive():
    files = WeightFiles(folder / "weights")
    state = {name: tensor.clone() for name, tensor in files.read_all(files.tensors)}
    empty_model(config).load_state_dict(state)


for name in ("tokenizer", "weights", "released", "halved", "base"):
    (folder / name).mkdir()
save_tokenizer(tiny_tokenizer(config.decoder.vocab_size).backend, folder / "tokenizer")
shard = 30_000_000
import molmo2core.checkpoints.reference as reference
reference.SHARD_BYTES = shard

model = measure("build", lambda: build_model(config, seed=0))
size = sum(parameter.numel() * 4 for parameter in model.parameters()) / 2**20
measure("save", lambda: save_weights(folder / "weights", model, config))
for name, dtype in (("released", "float32"), ("halved", "bfloat16")):
    measure(f"export {dtype}", lambda: export_model(
        folder / name, model, folder / "tokenizer", export=ExportConfig(dtype=dtype, shard_bytes=shard),
        preprocessing=PreprocessingConfig(), lineage=Lineage(),
    ))
write_base(model)
del model
measure("load", lambda: load_weights(folder / "weights"))
measure("import", lambda: import_released(folder / "released"))
measure("import bfloat16", lambda: import_released(folder / "halved"))
base = InitialWeights(decoder=str(folder / "base"))
measure("import base", lambda: initial_model(config, base, seed=0, workspace="."))
measure("naive", naive)
from transformers import AutoProcessor, Molmo2ForConditionalGeneration, Molmo2Processor  # not to be counted
measure("verify", lambda: verify_export(folder / "released", folder / "weights", tolerance=1e-3))
measure("verify bfloat16", lambda: verify_export(folder / "halved", folder / "weights", tolerance=1e-3))
print(json.dumps({"size": size, "files": len(WeightFiles(folder / "released").files), "shard": shard / 2**20, **found}))
'''


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    folder = tmp_path_factory.mktemp("memory")
    # A fixed threshold: freed blocks go back to the system at once, so one step leaves nothing to the next.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("step", "models", "files"),
    [
        ("build", 1, 0),  # 213 MB of a model of 206
        ("load", 1, 1),  # 217
        ("import", 1, 1),  # 217
        ("import bfloat16", 1, 1),  # 227
        ("import base", 1, 1),  # 220: connector and new tokens drawn too
        ("save", 0, 0),  # 1: written from where the weights are
        ("export float32", 0, 0),  # 1
        ("export bfloat16", 0, 1),  # 31: the file that is being made
        ("verify", 1, 2),  # 263: ours, then transformers', never both
        ("verify bfloat16", 1.5, 2),  # 315: transformers keeps the stored half beside the float32 that it makes of it
    ],
)
def test_peak_memory(step: str, models: float, files: int, measured: dict[str, float]) -> None:
    """Would catch all shards mapped at once, a state dict beside the model, random weights that are then replaced, and
    shards that are copied before they are written."""
    assert measured["files"] == 9 and 25 < measured["shard"] < 30
    assert measured[step] <= models * measured["size"] + files * measured["shard"] + SLACK
    if models:
        assert measured[step] >= measured["size"]  # it was measured at all


def test_the_measure_sees_a_second_copy(measured: dict[str, float]) -> None:
    """Negative control: all tensors read into a dictionary first (411 MB)."""
    assert measured["naive"] > 1.9 * measured["size"]
