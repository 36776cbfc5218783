"""Checkpoints by hand.

    import SOURCE --output WEIGHTS                               a whole Molmo2 -> weights of this project
    import --size 4b --decoder D --vision-encoder V --output W   base models -> weights to start stage 1 from
    export WEIGHTS --tokenizer T --output FOLDER                 weights -> Hugging Face folder, verified
    verify FOLDER --weights WEIGHTS                              compare with transformers' own Molmo2 once more

An address is a folder or `s3://bucket/folder`; SOURCE, D, V and T may also be `hf://organisation/name[@revision]`.
SOURCE may be in the released layout or in transformers' own.  An output appears whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from molmo2core import storage
from molmo2core.checkpoints.config import ExportConfig, InitialWeights
from molmo2core.errors import DataError, RecipeError, exit_with_message
from molmo2core.model.config import Size, named_config

if TYPE_CHECKING:
    from molmo2core.checkpoints.model_card import Lineage
    from molmo2core.checkpoints.verify import Verification
    from molmo2core.model.molmo2 import Molmo2

_PARTS = ("source", "decoder", "vision_encoder")
"""Arguments of `import` that name weights."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code says who can mend a failure (errors.py)."""
    started = time.monotonic()
    try:
        options = _parser().parse_args(arguments)
        _COMMANDS[options.command](options)
    except Exception as error:
        return exit_with_message(error)
    print(f"done in {time.monotonic() - started:.1f} s")
    return 0


def _import(options: argparse.Namespace) -> None:
    from molmo2core.checkpoints.reference import save_weights
    from molmo2core.checkpoints.weight_files import to_stderr

    _check_new(options.output)
    model = _imported(options)

    def fill(folder: Path) -> dict[str, Any]:
        save_weights(folder, model, model.config, to_stderr)
        return {"imported_from": {name: getattr(options, name) for name in (*_PARTS, "size", "seed")}}

    storage.commit_folder(options.output, fill)
    print(f"{options.output}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, float32")


def _imported(options: argparse.Namespace) -> Molmo2:
    from molmo2core.checkpoints.fetch import WEIGHT_FILES, fetched_folder
    from molmo2core.checkpoints.import_hf import import_released, initial_model
    from molmo2core.checkpoints.weight_files import to_stderr

    base = options.decoder or options.vision_encoder
    if not (options.source or base) or (base and not options.size):
        raise RecipeError(
            "import",
            found="neither SOURCE nor a base model" if not base else "a base model without --size",
            expected="SOURCE, or --size with --decoder and --vision-encoder",
            mend="see python -m molmo2core.checkpoints import --help",
        )
    if not options.size:
        with fetched_folder(options.source, ".", WEIGHT_FILES) as folder:
            return import_released(folder, to_stderr)
    weights = InitialWeights(molmo2=options.source, decoder=options.decoder, vision_encoder=options.vision_encoder)
    return initial_model(named_config(options.size), weights, seed=options.seed, workspace=".", progress=to_stderr)


def _export(options: argparse.Namespace) -> None:
    from molmo2core.checkpoints.export_hf import export_model
    from molmo2core.checkpoints.fetch import TOKENIZER_FILES, fetched_folder
    from molmo2core.checkpoints.reference import load_weights
    from molmo2core.checkpoints.verify import verify_export
    from molmo2core.checkpoints.weight_files import to_stderr
    from molmo2core.preprocessing.config import PreprocessingConfig

    _check_new(options.output)
    export, preprocessing = ExportConfig(dtype=options.dtype), PreprocessingConfig()
    verified: list[Verification] = []
    with (
        fetched_folder(options.weights, ".", ()) as weights,
        fetched_folder(options.tokenizer, ".", TOKENIZER_FILES) as tokenizer,
    ):

        def fill(folder: Path) -> dict[str, Any]:
            model = load_weights(weights, to_stderr)
            export_model(
                folder, model, tokenizer, export=export, preprocessing=preprocessing,
                lineage=_recorded_lineage(weights), progress=to_stderr,
            )  # fmt: skip
            del model
            verified.append(verify_export(folder, weights, tolerance=export.logit_tolerance, progress=to_stderr))
            return {"logit_difference": verified[0].worst}

        storage.commit_folder(options.output, fill)
    _print_verification(options.output, verified[0])


def _recorded_lineage(weights: Path) -> Lineage:
    """What the weights' folder says about itself: a stage's name, or what `import` read."""
    from molmo2core.checkpoints.model_card import Lineage

    if not storage.is_committed(str(weights)):
        return Lineage()
    committed = storage.open_committed(str(weights))
    imported = committed.meta.get("imported_from", {})
    return Lineage(
        checkpoint_digest=committed.digest,
        stage=committed.meta.get("stage", ""),
        step=int(committed.meta.get("facts", {}).get("steps", 0)),
        base_models=tuple((part, imported[part]) for part in _PARTS if imported.get(part)),
    )


def _verify(options: argparse.Namespace) -> None:
    from molmo2core.checkpoints.fetch import fetched_folder
    from molmo2core.checkpoints.verify import verify_export
    from molmo2core.checkpoints.weight_files import to_stderr

    tolerance = ExportConfig().logit_tolerance
    with fetched_folder(options.exported, ".", ()) as exported, fetched_folder(options.weights, ".", ()) as weights:
        _print_verification(options.exported, verify_export(exported, weights, tolerance=tolerance, progress=to_stderr))


def _print_verification(where: str, found: Verification) -> None:
    print(f"{where}: transformers' own Molmo2 agrees, all logits of {len(found.max_difference)} probes in float32")
    for probe, difference in found.max_difference.items():
        print(f"  {probe}: differs by at most {difference:.2g} of the largest logit ({found.max_logit:.3g})")
    print("  processor: same token ids, visual flags and pooling on an image prompt;", end=" ")
    print(f"pixels differ by at most {found.max_pixel_difference:.2g} of a byte step")


def _check_new(uri: str) -> None:
    """A committed folder would be reused in silence, though it holds something else."""
    if storage.list_files(uri):
        raise DataError(uri, found="files", expected="a new folder", mend="choose another --output, or remove it")


_COMMANDS = {"import": _import, "export": _export, "verify": _verify}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m molmo2core.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    to_ours = commands.add_parser("import", help="Molmo2 or base models -> this project's weights")
    to_ours.add_argument("source", nargs="?", default="", help="a whole Molmo2; its own config.json says which")
    to_ours.add_argument("--size", choices=get_args(Size), help="named size: required with base models, else a check")
    to_ours.add_argument("--decoder", default="", help="Qwen3 (4b, 8b) or OLMo3 (o-7b)")
    to_ours.add_argument("--vision-encoder", default="", help="SigLIP2")
    to_ours.add_argument("--seed", type=int, default=0, help="of what base models leave open (default: 0)")
    to_ours.add_argument("--output", required=True, help="new folder for the weights")

    to_released = commands.add_parser("export", help="this project's weights -> Hugging Face folder, verified")
    to_released.add_argument("weights", help="folder that import or a training stage wrote")
    to_released.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, extra tokens included")
    to_released.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    to_released.add_argument("--output", required=True, help="new folder")

    verify = commands.add_parser("verify", help="compare an export with transformers' own Molmo2")
    verify.add_argument("exported", help="folder that export wrote")
    verify.add_argument("--weights", required=True, help="this project's weights that it was made from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
