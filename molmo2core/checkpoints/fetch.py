"""Local copies of folders that come from outside the pipeline: base weights and tokenizers.

Addresses are folders (absolute, in the workspace, `s3://`) or `hf://organisation/name[@revision]`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from molmo2core import storage
from molmo2core.errors import CheckpointError, PlatformError

HUB = "hf://"
TOKENIZER_FILES = ("*.json",)
WEIGHT_FILES = ("*.json", "*.safetensors")


@contextmanager
def fetched_folder(uri: str, workspace: str, hub_files: tuple[str, ...]) -> Iterator[Path]:
    """A local folder with the files of `uri`, gone afterwards when it was copied from an object store.

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
        yield storage.fetch_folder(storage.resolve(workspace, uri), Path(temporary))


def _hub_folder(uri: str, hub_files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    name, _, revision = uri.removeprefix(HUB).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(hub_files)))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(uri, found="no such model on the hub", mend="check name, revision and access") from error
    except (HfHubHTTPError, OSError) as error:
        raise PlatformError(uri, found=f"the hub failed: {error}", mend="check the network or use a folder") from error
