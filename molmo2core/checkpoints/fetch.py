"""Local copies of folders that come from outside the pipeline: base weights and tokenizers.

Addresses are folders (absolute, in the workspace, `s3://`) or `hf://organisation/name[@revision]`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo2core import storage
from molmo2core.errors import CheckpointError, DataError, PlatformError

HUB = "hf://"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt",
)  # fmt: skip
WEIGHT_FILES = (
    "config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
)  # fmt: skip


@contextmanager
def fetched_folder(uri: str, workspace: str, hub_files: tuple[str, ...]) -> Iterator[Path]:
    """A local folder with the files of `uri`, committed or not; gone afterwards when copied from an object store.

    Args:
        hub_files: patterns of the files that are wanted from the hub.

    Raises:
        CheckpointError: no such model on the hub.
        DataError: no such folder.
        PlatformError: the object store or the hub failed.
    """
    if uri.startswith(HUB):
        yield _hub_folder(uri, hub_files)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield _stored_folder(uri, workspace, Path(temporary))


def _stored_folder(uri: str, workspace: str, copy: Path) -> Path:
    address = storage.resolve(workspace, uri)
    if storage.is_committed(address):
        return storage.fetch_committed(address, copy)
    try:
        return storage.fetch_folder(address, copy)
    except DataError as error:
        if "://" in uri or uri.count("/") != 1:
            raise
        raise DataError(
            error.where, found=error.found, mend=f"check the address; a model of the hub is written {HUB}{uri}"
        ) from error


def _hub_folder(uri: str, hub_files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = uri.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(hub_files)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            uri, found="no such model or revision on the hub", mend="check name, revision and access (HF_TOKEN)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise PlatformError(
            uri,
            found=f"not in the local cache, and the hub did not answer ({str(error).splitlines()[0]})",
            mend="connect, unset HF_HUB_OFFLINE, or copy the files here and give their folder",
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise PlatformError(uri, found=f"the hub failed: {error}", mend="check the network or use a folder") from error
