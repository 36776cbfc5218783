"""A run killed with SIGKILL, whole process tree, again and again at other steps: the next run goes on and completes.

Catches a stage that takes half-written output for whole, one that cannot start over what it left, and ranks that
outlive their launcher.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from molmo2core import storage
from molmo2core.references import CheckpointRef, ModelVersionRef
from workflows.summary import read_references

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.shapes={images: 15, image_sets: 4, videos: 12, texts: 5, vocab_size: 768}",
    "train.pretrain.steps=6", "train.sft.steps=2", "train.long_context.steps=2",
    "train.pretrain.save_interval_steps=2", "train.pretrain.log_interval_steps=1",
    "train.pretrain.global_batch_packs=2", "train.sft.global_batch_packs=2", "train.long_context.global_batch_packs=2",
    "evaluate.max_examples_per_dataset=2", "evaluate.max_new_tokens=4",
    "evaluate.gate=[{metric: image_qa/accuracy, minimum: 0.0}]",
]  # fmt: skip
MOMENTS = (
    "validate_data: started",
    "build_shards.text: started",
    "pretrain: step 4/6",
    "train.long_context: started",
    "register_model: started",
)
"""Lines after which everything is killed."""
FOLDERS = ("manifests/*", "shards/*/*", "plans/*/*", "checkpoints/*/*", "exports/*", "evaluations/*")


def command(workspace: Path) -> list[str]:
    arguments = [sys.executable, "-m", "workflows.run", "local", "--recipe", "workflows/recipes/tiny.yaml"]
    arguments += ["--workspace", str(workspace)]
    for override in SMALL:
        arguments += ["--set", override]
    return arguments


def run_until(line: str, workspace: Path) -> list[psutil.Process]:
    """Start a run, kill its whole tree a moment after `line` is printed; return the processes that were killed."""
    run = subprocess.Popen(
        command(workspace), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert run.stdout is not None
    seen = []
    for printed in run.stdout:
        seen.append(printed)
        if line in printed:
            break
    else:
        raise AssertionError(f"never printed {line!r}:\n" + "".join(seen[-40:]))
    time.sleep(0.7)
    tree = psutil.Process(run.pid)
    processes = [*tree.children(recursive=True), tree]
    for process in processes:
        process.kill()
    run.communicate(timeout=60)
    return processes


def check_nothing_half_written(workspace: Path) -> None:
    """Every folder with a stage's name is whole: its marker is there and each file has the size it says."""
    for pattern in FOLDERS:
        for folder in [*workspace.glob(pattern), *workspace.glob(f"{pattern}.parts/*")]:  # finished parts of shards
            if folder.name.startswith(".") or folder.suffix in (".resume", ".parts") or not folder.is_dir():
                continue
            for name, facts in storage.open_committed(str(folder)).files.items():
                assert (folder / name).stat().st_size == facts["bytes"], folder / name


def test_killed_at_five_moments_a_run_completes(tmp_path: Path) -> None:
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    for moment in MOMENTS:
        killed = run_until(moment, tmp_path)
        assert not psutil.wait_procs(killed, timeout=30)[1], f"still alive after being killed at {moment!r}"
        check_nothing_half_written(tmp_path)
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    newest = max(path for path in (tmp_path / "kfp").iterdir() if path.is_dir())
    references = read_references(newest)
    assert [r.step for r in references if isinstance(r, CheckpointRef)] == [6, 2, 2]
    (version,) = (r for r in references if isinstance(r, ModelVersionRef))
    assert version.version == "1", "a killed registration must not leave a second version behind"
    assert set(version.aliases) == {"candidate", "champion"}
    check_nothing_half_written(tmp_path)
