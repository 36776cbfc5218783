"""Files on a local disk or behind `s3://` (boto3), and folders that become visible whole or not at all.

A *committed folder* is immutable: its files, then `_SUCCESS.json` last, which lists every file with size and
sha256.  Local folders are prepared beside their destination and renamed; S3 folders get their marker by a conditional
put.  Readers refuse a folder without its marker, so a killed writer leaves nothing that a later stage can see.

The endpoint of S3 comes from the environment (`AWS_ENDPOINT_URL_S3`, mlflow_gx_mds_s3.md 4.2).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from molmo2core.errors import DataError, PlatformError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MARKER = "_SUCCESS.json"
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CommittedFolder:
    """A folder whose marker was read."""

    uri: str
    files: dict[str, dict[str, Any]]
    """Relative name -> {"bytes": int, "sha256": str}."""
    meta: dict[str, Any]
    """Whatever the writer recorded with the commit (its reference's fields, typically)."""

    @property
    def digest(self) -> str:
        """sha256 over the sorted file list: depends on content only, not on place or time."""
        lines = (f"{name} {facts['bytes']} {facts['sha256']}\n" for name, facts in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_remote(uri: str) -> bool:
    """Whether `uri` is an object-store address."""
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri/part/part`, for local paths and addresses alike."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(workspace: str, uri: str) -> str:
    """`uri` as given when it is absolute or remote, else inside `workspace`."""
    return uri if "://" in uri or os.path.isabs(uri) else join(workspace, uri)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a local file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def content_key(*parts: object) -> str:
    """16 hex digits that name an output by everything it is made from (each part is serialised as sorted JSON)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_bytes(uri: str) -> bytes:
    """Content of one file.

    Raises:
        DataError: there is no such file.
        PlatformError: the object store failed.
    """
    if is_remote(uri):
        with _s3_errors(uri):
            return _client().get_object(**_bucket_key(uri))["Body"].read()
    try:
        return Path(uri).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(uri, found="no such file", mend="check the path") from error


def write_bytes(uri: str, content: bytes) -> None:
    """Write one file atomically: readers see the old content or the new, never a part."""
    if is_remote(uri):
        with _s3_errors(uri):
            _client().put_object(Body=content, **_bucket_key(uri))
        return
    path = Path(uri)
    with _disk_errors(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def exists(uri: str) -> bool:
    """Whether one file exists."""
    if not is_remote(uri):
        return Path(uri).is_file()
    try:
        with _s3_errors(uri):
            _client().head_object(**_bucket_key(uri))
    except DataError:
        return False
    return True


def list_files(uri: str) -> list[str]:
    """Relative names of all files below `uri`, sorted; empty when there is no such folder."""
    if not is_remote(uri):
        root = Path(uri)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    location = _bucket_key(join(uri, ""))
    with _s3_errors(uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=location["Bucket"], Prefix=location["Key"])
        return sorted(item["Key"][len(location["Key"]) :] for page in pages for item in page.get("Contents", []))


def download(uri: str, destination: Path) -> Path:
    """Copy one file to the local `destination`, atomically."""
    if not is_remote(uri):
        write_bytes(str(destination), read_bytes(uri))
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.part")
    location = _bucket_key(uri)
    with _s3_errors(uri), _disk_errors(str(destination)):
        _client().download_file(location["Bucket"], location["Key"], str(temporary))
        os.replace(temporary, destination)
    return destination


def fetch_folder(uri: str, destination: Path) -> Path:
    """A local folder with the files of `uri`, which nobody committed (a tokenizer, base weights): the folder itself
    when local, else a copy at `destination`.

    Raises:
        DataError: there is no such folder, or it is empty.
    """
    names = list_files(uri)
    if not names:
        raise DataError(uri, found="no such folder, or an empty one", mend="check the address")
    if not is_remote(uri):
        return Path(uri)
    for name in names:
        download(join(uri, name), destination / name)
    return destination


def is_committed(uri: str) -> bool:
    """Whether the folder has its marker."""
    return exists(join(uri, MARKER))


def open_committed(uri: str) -> CommittedFolder:
    """Read a folder's marker.

    Raises:
        DataError: the folder is missing or was never committed.
    """
    if not is_committed(uri):
        raise DataError(uri, found="no committed folder", expected=MARKER, mend="run the stage that writes it")
    marker = json.loads(read_bytes(join(uri, MARKER)))
    return CommittedFolder(uri=uri, files=marker["files"], meta=marker["meta"])


def fetch_committed(uri: str, cache: Path) -> Path:
    """A local folder with the committed content: the folder itself when local, else downloaded below `cache`.

    Every downloaded file is checked against the marker's sha256.

    Raises:
        DataError: the folder is not committed, or a file does not have the recorded checksum.
    """
    folder = open_committed(uri)
    if not is_remote(uri):
        return Path(uri)
    local = cache / folder.digest
    if is_committed(str(local)):
        return local

    def copy(destination: Path) -> dict[str, Any]:
        for name, facts in folder.files.items():
            path = download(join(uri, name), destination / name)
            if file_sha256(path) != facts["sha256"]:
                raise DataError(join(uri, name), found="another checksum", expected=facts["sha256"])
        return folder.meta

    commit_folder(str(local), copy)
    return local


def commit_folder(uri: str, fill: Callable[[Path], dict[str, Any]]) -> CommittedFolder:
    """Let `fill` write files into a fresh local folder, then publish them at `uri`, marker last.

    If another writer committed `uri` meanwhile, its folder stands and is returned: names are derived from content
    (`content_key`), so both hold the same.

    Args:
        uri: destination folder, local or `s3://`.
        fill: writes the files and returns the marker's `meta`.

    Raises:
        PlatformError: the disk is full or the object store failed; nothing is visible at `uri` then.
    """
    if is_committed(uri):
        return open_committed(uri)
    parent = Path(tempfile.gettempdir()) if is_remote(uri) else Path(uri).parent
    with _disk_errors(uri):
        parent.mkdir(parents=True, exist_ok=True)
        attempt = Path(tempfile.mkdtemp(prefix=".attempt-", dir=parent))
    try:
        with _disk_errors(uri):
            meta = fill(attempt)
            files = {
                name: {"bytes": (attempt / name).stat().st_size, "sha256": file_sha256(attempt / name)}
                for name in list_files(str(attempt))
            }
            marker = json.dumps({"files": files, "meta": meta}, sort_keys=True, indent=1).encode()
            if is_remote(uri):
                _publish_remote(uri, attempt, list(files), marker)
            else:
                write_bytes(str(attempt / MARKER), marker)
                attempt.chmod(0o755)
                _rename_folder(attempt, Path(uri))
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    return open_committed(uri)


def _rename_folder(attempt: Path, destination: Path) -> None:
    try:
        os.rename(attempt, destination)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_committed(str(destination)):  # something uncommitted stands there: not ours, so never deleted
            raise DataError(
                str(destination), found="an uncommitted folder in the way", mend="move it aside and run again"
            ) from error


def _publish_remote(uri: str, attempt: Path, names: list[str], marker: bytes) -> None:
    client = _client()
    with _s3_errors(uri):
        for name in names:
            location = _bucket_key(join(uri, name))
            client.upload_file(str(attempt / name), location["Bucket"], location["Key"])
        try:
            client.put_object(Body=marker, IfNoneMatch="*", **_bucket_key(join(uri, MARKER)))
        except client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("PreconditionFailed", "412"):
                raise


@functools.cache
def _client() -> S3Client:
    import boto3

    return boto3.client("s3")


class _Location(TypedDict):
    Bucket: str
    Key: str


def _bucket_key(uri: str) -> _Location:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in ("404", "NoSuchKey", "NoSuchBucket"):
            raise DataError(uri, found="no such object", mend="check the address") from error
        if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise DataError(uri, found=f"access denied ({code})", mend="check credentials and rights") from error
        raise PlatformError(uri, found=f"object store: {error}") from error
    except BotoCoreError as error:
        raise PlatformError(uri, found=f"object store: {error}", mend="check AWS_ENDPOINT_URL_S3") from error


@contextmanager
def _disk_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise PlatformError(
            uri, found=f"cannot write: {error.strerror}", mend="free space or choose another workspace"
        ) from error
