"""Step 5: trained weights become a Hugging Face folder in the released format, accepted only after verification."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.errors import exit_with_message
from molmo2core.recipe.load import from_json
from molmo2core.recipe.sections import ExportSection
from molmo2core.references import CheckpointRef, ExportRef, ShardsRef, read_reference, write_reference
from molmo2core.special_tokens import tokenizer_digest
from molmo2core.stages.report import StageReport

FORMAT = "export-2"


def run(section: ExportSection, *, checkpoint: Path, output: Path) -> StageReport:
    """Export the weights named by `checkpoint`, unless the same export is there already.

    Args:
        section: format, tokenizer, limits.
        checkpoint: a CheckpointRef.
        output: the ExportRef is written here.

    Raises:
        CheckpointError: the weights are damaged, the tokenizer is another model's, or transformers' own Molmo2 does
            not give the same logits; nothing is visible then.
        DataError: the checkpoint or the tokenizer is missing.
        PlatformError: storage failed.
    """
    from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder

    started = time.monotonic()
    trained = read_reference(checkpoint, CheckpointRef)
    with fetched_folder(section.tokenizer, section.workspace, TOKENIZER_FILES) as tokenizer:
        lineage = _lineage(section, trained)
        key = storage.content_key(
            FORMAT,
            dataclasses.asdict(section.export),
            dataclasses.asdict(section.preprocessing),
            tokenizer_digest(tokenizer),
            lineage,
        )
        uri = storage.join(section.workspace, "exports", key)
        reused = storage.is_committed(uri)
        folder = storage.commit_folder(uri, lambda path: _export(path, section, trained, tokenizer, lineage))
    seconds = time.monotonic() - started
    report = StageReport(
        stage="export_checkpoint",
        seconds=seconds,
        reused=reused,
        metrics={"logit_difference": folder.meta["logit_difference"]},
        lines=(
            f"exported model: {folder.uri}",
            f"transformers' Molmo2 differs by at most {folder.meta['logit_difference']:.2g} of the largest logit",
        ),
    )
    write_reference(
        ExportRef(
            uri=folder.uri,
            digest=folder.digest,
            facts=folder.meta,
            report=report.to_json(),
            parents=(trained,),
            step=trained.step,
        ),
        output,
    )
    print(f"export_checkpoint: {'reused' if reused else 'made'} {folder.uri} in {seconds:.1f} s")
    return report


def _lineage(section: ExportSection, trained: CheckpointRef) -> dict[str, Any]:
    """What the model card names; fields of checkpoints.model_card.Lineage."""
    stages = [ref for ref in trained.ancestors() if isinstance(ref, CheckpointRef)]
    datasets = {ref.dataset: ref.digest for ref in trained.ancestors() if isinstance(ref, ShardsRef)}
    return {
        "checkpoint_digest": trained.digest,
        "recipe_fingerprint": trained.recipe_fingerprint,
        "stage": trained.stage,
        "step": trained.step,
        "datasets": tuple(sorted(datasets.items())),
        "base_models": tuple((part, uri) for part, uri in dataclasses.asdict(section.initial_weights).items() if uri),
        "metrics": tuple(
            (f"{ref.stage}, last loss", ref.facts["last_loss"]) for ref in stages[::-1] if "last_loss" in ref.facts
        ),
    }


def _export(
    folder: Path, section: ExportSection, trained: CheckpointRef, tokenizer: Path, lineage: dict[str, Any]
) -> dict[str, Any]:
    """Fill and verify the export's folder; returns the reference's facts."""
    from molmo2core.checkpoints.export_hf import export_model
    from molmo2core.checkpoints.model_card import Lineage
    from molmo2core.checkpoints.reference import load_weights
    from molmo2core.checkpoints.verify import verify_export
    from molmo2core.checkpoints.weight_files import to_stderr

    with tempfile.TemporaryDirectory() as cache:
        print("export_checkpoint: reading the weights", flush=True)
        weights = storage.fetch_committed(trained.uri, Path(cache))
        model = load_weights(weights, to_stderr)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        print("export_checkpoint: writing the released format", flush=True)
        export_model(
            folder,
            model,
            tokenizer,
            export=section.export,
            preprocessing=section.preprocessing,
            lineage=Lineage(**lineage),
            progress=to_stderr,
        )
        del model  # the verification holds one model at a time
        print("export_checkpoint: comparing with transformers' own Molmo2", flush=True)
        tolerance = section.export.logit_tolerance
        verification = verify_export(folder, weights, tolerance=tolerance, progress=to_stderr)
    return {
        "num_parameters": num_parameters,
        "logit_difference": verification.worst,
        "largest_logit": verification.max_logit,
    }


def main() -> int:
    """Run from files; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m molmo2core.stages.export", description=__doc__)
    parser.add_argument("--section", type=Path, required=True, help="JSON of an ExportSection")
    parser.add_argument("--checkpoint", type=Path, required=True, help="CheckpointRef")
    parser.add_argument("--output", type=Path, required=True, help="where the ExportRef is written")
    arguments = parser.parse_args()
    try:
        section = from_json(arguments.section.read_text(), ExportSection)
        run(section, checkpoint=arguments.checkpoint, output=arguments.output)
    except Exception as error:
        return exit_with_message(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
