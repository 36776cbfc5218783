"""Checkpoints by hand.

    python -m molmo2core.checkpoints import SOURCE --output FOLDER              released format -> our weights
    python -m molmo2core.checkpoints export FOLDER --tokenizer T --output OUT   our weights -> released format
    python -m molmo2core.checkpoints verify OUT --weights FOLDER                compare with transformers' Molmo2

SOURCE, FOLDER and T are folders or `s3://` addresses, SOURCE and T also `hf://organisation/name[@revision]`.  `export`
verifies what it wrote and leaves nothing behind when transformers disagrees.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molmo2core import storage
from molmo2core.checkpoints.config import ExportConfig
from molmo2core.errors import exit_with_message


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says who can mend a failure (errors.py)."""
    try:
        options = _parser().parse_args(arguments)
        _COMMANDS[options.command](options)
    except Exception as error:
        return exit_with_message(error)
    return 0


def _import(options: argparse.Namespace) -> None:
    from molmo2core.checkpoints.fetch import WEIGHT_FILES, fetched_folder
    from molmo2core.checkpoints.import_hf import import_released
    from molmo2core.checkpoints.reference import save_weights

    with fetched_folder(options.source, ".", WEIGHT_FILES) as source:
        model = import_released(source)

        def fill(folder: Path) -> dict[str, Any]:
            save_weights(folder, model, model.config)
            return {"imported_from": options.source}

        storage.commit_folder(options.output, fill)
    print(f"imported {options.source} into {options.output}")


def _export(options: argparse.Namespace) -> None:
    from molmo2core.checkpoints.export_hf import Lineage, export_model
    from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder
    from molmo2core.checkpoints.reference import load_weights
    from molmo2core.checkpoints.verify import verify_export
    from molmo2core.preprocessing.config import PreprocessingConfig

    export, preprocessing = ExportConfig(dtype=options.dtype), PreprocessingConfig()
    with (
        fetched_folder(options.weights, ".", ()) as weights,
        fetched_folder(options.tokenizer, ".", TOKENIZER_FILES) as tokenizer,
    ):
        model = load_weights(weights)

        def fill(folder: Path) -> dict[str, Any]:
            export_model(folder, model, tokenizer, export=export, preprocessing=preprocessing, lineage=Lineage())
            found = verify_export(folder, model, tolerance=export.logit_tolerance)
            return {"logit_difference": found.worst}

        committed = storage.commit_folder(options.output, fill)
    print(f"exported {options.output}; logits differ by {committed.meta['logit_difference']:.2g} of the largest")


def _verify(options: argparse.Namespace) -> None:
    from molmo2core.checkpoints.fetch import fetched_folder
    from molmo2core.checkpoints.reference import load_weights
    from molmo2core.checkpoints.verify import verify_export

    with fetched_folder(options.exported, ".", ()) as exported, fetched_folder(options.weights, ".", ()) as weights:
        found = verify_export(exported, load_weights(weights), tolerance=ExportConfig().logit_tolerance)
    for probe, difference in found.max_difference.items():
        print(f"{probe}: logits differ by at most {difference:.2g} of the largest ({found.max_logit:.3g})")


_COMMANDS = {"import": _import, "export": _export, "verify": _verify}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m molmo2core.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    from_released = commands.add_parser("import", help="released format -> this project's weights")
    from_released.add_argument("source")
    from_released.add_argument("--output", required=True, help="folder to commit")
    to_released = commands.add_parser("export", help="this project's weights -> released format, verified")
    to_released.add_argument("weights")
    to_released.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    to_released.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    to_released.add_argument("--output", required=True, help="folder to commit")
    verify = commands.add_parser("verify", help="compare an export with transformers' own Molmo2")
    verify.add_argument("exported")
    verify.add_argument("--weights", required=True, help="this project's weights that it was made from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
