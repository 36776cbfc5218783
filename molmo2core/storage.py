"""Files on a local disk or behind `s3://` (boto3), and folders that become visible whole or not at all.

A *committed folder* is immutable: its files, then `_SUCCESS.json` last, which lists every file with size and
sha256.  Local folders are prepared beside their destination and renamed; on S3 each writer uploads to a folder of its
own, and a conditional put decides to which of them the marker points (`CommittedFolder.uri`).  Readers refuse a folder
without its marker, so a killed writer leaves nothing that a later stage can see; who commits beside or to the same
folder a week later removes it.

The endpoint of S3 comes from the environment (`AWS_ENDPOINT_URL_S3`, mlflow_gx_mds_s3.md 4.2).
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypedDict

from molmo2core.errors import DataError, PlatformError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MARKER = "_SUCCESS.json"
ABANDONED_SECONDS = 7 * 24 * 3600
"""An attempt in which nothing has changed for so long is taken for a killed writer's."""
CONNECTIONS = 32
"""To the object store, of one process; more threads than that wait."""
ATTEMPT, _UPLOAD = ".attempt-", "by-attempt-"
_UPLOADS = 8
_TRIES = 4
_BLOCK = 1 << 20
_MISSING = ("404", "NoSuchKey", "NoSuchBucket")
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
_CANNOT_LINK = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a committed folder."""

    uri: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CommittedFolder:
    """A folder whose marker was read."""

    uri: str
    """Where its files are: what references carry.  On S3 a folder below the one that was committed."""
    files: dict[str, dict[str, Any]]
    """Relative name -> {"bytes": int, "sha256": str}."""
    meta: dict[str, Any]
    """Whatever the writer recorded with the commit (its reference's fields, typically)."""

    @property
    def digest(self) -> str:
        """sha256 over the sorted file list: depends on content only, not on place or time."""
        lines = (f"{name} {facts['bytes']} {facts['sha256']}\n" for name, facts in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def stored(self, name: str) -> StoredFile:
        """One of its files.

        Raises:
            DataError: the folder has no such file.
        """
        if name not in self.files:
            raise DataError(self.uri, found=f"no file {name}", expected=f"one of {len(self.files)} others")
        facts = self.files[name]
        return StoredFile(uri=join(self.uri, name), num_bytes=facts["bytes"], sha256=facts["sha256"])

    def read(self, name: str) -> bytes:
        """Content of one of its files.

        Raises:
            DataError: the folder has no such file, or its content is not the one that was committed.
        """
        stored = self.stored(name)
        content = read_bytes(stored.uri)
        if hashlib.sha256(content).hexdigest() != stored.sha256:
            raise DataError(
                stored.uri,
                found="another checksum",
                expected=stored.sha256,
                mend="remove the folder and run the stage that writes it",
            )
        return content


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


def file_facts(path: Path) -> dict[str, Any]:
    """What a marker says of one file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


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
            return _read_object(uri)
    try:
        return Path(uri).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(uri, found="no such file", mend="check the path") from error


def _read_object(uri: str) -> bytes:
    """The whole object; a connection that ends in the middle is tried again (boto3 retries requests, not bodies)."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    for _ in range(_TRIES - 1):
        with suppress(IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            return _client().get_object(**_bucket_key(uri))["Body"].read()
    return _client().get_object(**_bucket_key(uri))["Body"].read()


@contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """A file to be read piece by piece; a remote one by way of a temporary copy.

    Raises:
        DataError: there is no such file.
        PlatformError: the object store failed, or there is no room for the copy.
    """
    with tempfile.TemporaryDirectory(prefix="opened-") as folder:
        path = download(uri, Path(folder) / "copy") if is_remote(uri) else Path(uri)
        try:
            file = path.open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise DataError(uri, found="no such file", mend="check the path") from error
        with file:
            yield file


def file_sizes(uris: Iterable[str]) -> list[int]:
    """Bytes of each file, asked for side by side where they are remote.

    Raises:
        DataError: one is not there.
        PlatformError: the object store failed.
    """

    def size(uri: str) -> int:
        if is_remote(uri):
            with _s3_errors(uri):
                return _client().head_object(**_bucket_key(uri))["ContentLength"]
        path = Path(uri)
        if not path.is_file():
            raise DataError(uri, found="no such file", mend="check the path")
        return path.stat().st_size

    wanted = list(uris)
    if not any(map(is_remote, wanted)):
        return list(map(size, wanted))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(size, wanted))


def write_bytes(uri: str, content: bytes) -> None:
    """Write one file atomically: readers see the old content or the new, never a part."""
    if is_remote(uri):
        with _s3_errors(uri):
            _client().put_object(Body=content, **_bucket_key(uri))
        return
    with _replacement(Path(uri)) as temporary:
        temporary.write_bytes(content)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write one file whole, only if there is none: whether it was written.  Of several writers exactly one succeeds."""
    if is_remote(uri):
        with _s3_errors(uri):
            return _create_object(uri, content)
    prepared = f"{uri}.{os.getpid()}.{threading.get_ident()}"
    try:
        write_bytes(prepared, content)
        os.link(prepared, uri)  # unlike a rename, it fails if the file exists; unlike O_EXCL, the file appears whole
    except FileExistsError:
        return False
    finally:
        Path(prepared).unlink(missing_ok=True)
    return True


def _create_object(uri: str, content: bytes) -> bool:
    client = _client()
    for _ in range(_TRIES):
        try:
            client.put_object(Body=content, IfNoneMatch="*", **_bucket_key(uri))
            return True
        except client.exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("PreconditionFailed", "412"):
                return False
            if code != "ConditionalRequestConflict":  # undecided: another put or a deletion is under way
                raise
    raise PlatformError(uri, found=f"another writer in the way, {_TRIES} times")


def exists(uri: str) -> bool:
    """Whether one file exists."""
    if not is_remote(uri):
        return Path(uri).is_file()
    with _s3_errors(uri):
        try:
            _client().head_object(**_bucket_key(uri))
        except _client().exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in _MISSING:  # no access is not the same as no file
                raise
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
    location = _bucket_key(uri)
    with _s3_errors(uri), _replacement(destination) as temporary:
        _client().download_file(location["Bucket"], location["Key"], str(temporary))
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
    try:
        marker = json.loads(read_bytes(join(uri, MARKER)))
        return CommittedFolder(uri=join(uri, *marker["at"]), files=marker["files"], meta=marker["meta"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(join(uri, MARKER), found=f"a damaged marker ({error})", mend="delete the folder") from error


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
            path = download(join(folder.uri, name), destination / name)
            if file_sha256(path) != facts["sha256"]:
                raise DataError(join(folder.uri, name), found="another checksum", expected=facts["sha256"])
        return folder.meta

    commit_folder(str(local), copy)
    return local


def commit_folder(
    uri: str, fill: Callable[[Path], dict[str, Any]], collected: Mapping[str, StoredFile] | None = None
) -> CommittedFolder:
    """Let `fill` write files into a fresh local folder, then publish them at `uri`, marker last.

    If another writer committed `uri` meanwhile, its folder stands and is returned: names are derived from content
    (`content_key`), so both hold the same.

    Args:
        uri: destination folder, local or `s3://`.
        fill: writes the files and returns the marker's `meta`.
        collected: relative name -> a file of another committed folder of the same store, which this one holds too:
            linked on a local disk, copied inside the object store.  Its checksum is not computed again.

    Returns:
        The folder that stands; references carry its `uri`.

    Raises:
        PlatformError: the disk is full or the object store failed; nothing is visible at `uri` then.
    """
    if is_committed(uri):
        return open_committed(uri)
    parent = Path(tempfile.gettempdir()) if is_remote(uri) else Path(uri).parent
    with _disk_errors(uri):
        parent.mkdir(parents=True, exist_ok=True)
        attempt = Path(tempfile.mkdtemp(prefix=ATTEMPT, dir=parent))
    _remove_abandoned_attempts(str(parent))
    collected = collected or {}
    try:
        with _disk_errors(uri):
            meta = fill(attempt)
            files = {name: file_facts(attempt / name) for name in list_files(str(attempt))}
            files |= {name: {"bytes": file.num_bytes, "sha256": file.sha256} for name, file in collected.items()}
            marker = seal_folder(attempt, files, meta)
            if is_remote(uri):
                _publish_remote(uri, attempt, marker, collected)
            else:
                for name, file in collected.items():
                    _link_or_copy(Path(file.uri), attempt / name)
                attempt.chmod(0o755)
                _rename_folder(attempt, Path(uri))
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    return open_committed(uri)


def seal_folder(folder: Path, files: Mapping[str, Mapping[str, Any]], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Write the marker of a local folder that several processes have filled; return its content.

    Args:
        files: relative name -> `file_facts`, of all files.
    """
    marker = {"files": dict(files), "meta": dict(meta), "at": []}
    write_bytes(str(folder / MARKER), _marker_bytes(marker))
    return marker


def damage(folder: Path) -> str:
    """What is wrong with a local folder, and with which file; empty if all is as it was committed."""
    try:
        files = open_committed(str(folder)).files
    except DataError as error:
        return str(error)

    def of_file(name: str) -> str:
        path, size = folder / name, files[name]["bytes"]
        try:
            if path.stat().st_size != size:
                return f"{path}: {path.stat().st_size} bytes; expected {size}"
            return "" if file_sha256(path) == files[name]["sha256"] else f"{path}: other content than was written"
        except OSError as error:
            return f"{path}: {error.strerror}"

    with ThreadPoolExecutor(min(_UPLOADS, os.cpu_count() or 1)) as pool:  # hashing leaves the interpreter's lock
        return next(filter(None, pool.map(of_file, sorted(files))), "")


def upload_committed(folder: Path, uri: str) -> None:
    """Copy a committed local folder to the remote `uri`, marker last; it takes the place of what was there.

    Raises:
        DataError: no such bucket, no right to write, or no committed folder.
        PlatformError: the object store failed; readers see what was there before.
    """
    committed = open_committed(str(folder))
    at = f"{_UPLOAD}{uuid.uuid4().hex[:12]}"
    marker = {"files": committed.files, "meta": committed.meta, "at": [at]}
    with _s3_errors(uri):
        _put_files(uri, at, folder, committed.files, {})
    write_bytes(join(uri, MARKER), _marker_bytes(marker))


def remove_folder(uri: str) -> None:
    """Remove a folder with all that is below it, if it is there.  A reader finds it committed and whole, or not at all.

    Raises:
        PlatformError: the object store failed.
    """
    if not is_remote(uri):
        if Path(uri).is_dir():
            gone = tempfile.mkdtemp(prefix=ATTEMPT, dir=Path(uri).parent)
            with suppress(FileNotFoundError):
                os.rename(uri, Path(gone) / "removed")  # so that nobody sees a part of it
            shutil.rmtree(gone, ignore_errors=True)
        return
    _remove_objects(uri, sorted(list_files(uri), key=lambda name: not name.endswith(MARKER)))


def _remove_objects(uri: str, names: Sequence[str]) -> None:
    with _s3_errors(uri):
        for first in range(0, len(names), 1000):  # the most that one request takes
            keys = [_bucket_key(join(uri, name)) for name in names[first : first + 1000]]
            _client().delete_objects(
                Bucket=keys[0]["Bucket"], Delete={"Objects": [{"Key": key["Key"]} for key in keys], "Quiet": True}
            )


def remove_abandoned(parent: str, pattern: str, *, keep: str = "") -> None:
    """Remove the folders right below `parent` with names like `pattern` in which nothing has changed for a week.

    What cannot be removed stays, for want of rights or because another process removes it too.
    """
    with suppress(DataError, PlatformError, OSError):
        for name in fnmatch.filter(list_folders(parent), pattern):
            if name != keep and time.time() - _last_change(join(parent, name)) > ABANDONED_SECONDS:
                remove_folder(join(parent, name))


def list_folders(uri: str) -> list[str]:
    """Names of the folders right below `uri`; none when it is no folder.

    Raises:
        DataError: there is no such bucket, or no access to it.
        PlatformError: the object store failed.
    """
    if not is_remote(uri):
        return [path.name for path in Path(uri).iterdir() if path.is_dir()] if Path(uri).is_dir() else []
    location = _bucket_key(join(uri, ""))
    with _s3_errors(uri):
        pages = _client().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=location["Bucket"], Prefix=location["Key"], Delimiter="/")
        prefixes = [item["Prefix"] for page in found for item in page.get("CommonPrefixes", [])]
    return [prefix[len(location["Key"]) : -1] for prefix in prefixes]


def _last_change(uri: str) -> float:
    """Unix time of the newest change to a folder."""
    if not is_remote(uri):
        # ctime: unlike mtime, copying a file with its times does not set it back
        return max(path.lstat().st_ctime for path in (Path(uri), *Path(uri).rglob("*")))
    location = _bucket_key(join(uri, ""))
    with _s3_errors(uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=location["Bucket"], Prefix=location["Key"])
        times = [item["LastModified"].timestamp() for page in pages for item in page.get("Contents", [])]
    return max(times, default=time.time())


@functools.cache  # a folder of thousands of parts is looked through once, not for each part
def _remove_abandoned_attempts(parent: str) -> None:
    remove_abandoned(parent, f"{ATTEMPT}*")


def _link_or_copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, destination)
    except FileNotFoundError as error:
        raise DataError(str(source), found="no such file", mend="run the stage again") from error
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        shutil.copyfile(source, destination)


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


def _marker_bytes(marker: dict[str, Any]) -> bytes:
    return json.dumps(marker, sort_keys=True, indent=1).encode()


def _publish_remote(uri: str, attempt: Path, marker: dict[str, Any], collected: Mapping[str, StoredFile]) -> None:
    """Upload to a folder of this attempt alone, then let the marker at `uri` point to it unless another's does.

    Uploading to `uri` itself would let a late writer put its files over those of the writer that committed.
    """
    at = f"{_UPLOAD}{attempt.name.removeprefix(ATTEMPT)}"
    with _s3_errors(uri):
        _put_files(uri, at, attempt, marker["files"], collected)
        won = create_bytes(join(uri, MARKER), _marker_bytes(marker | {"at": [at]}))
    standing = at if won else open_committed(uri).uri.rpartition("/")[2]  # after a lost answer it may be ours after all
    if standing != at:
        with suppress(DataError, PlatformError):  # no right to delete is no reason to fail
            remove_folder(join(uri, at))
    remove_abandoned(uri, f"{_UPLOAD}*", keep=standing)


def _put_files(uri: str, at: str, folder: Path, names: Iterable[str], collected: Mapping[str, StoredFile]) -> None:
    """Files and then the marker of `folder` to `uri/at`; those in `collected` are copied inside the store."""
    client = _client()

    def put(name: str) -> None:
        location = _bucket_key(join(uri, at, name))
        if name in collected:
            source = _bucket_key(collected[name].uri)
            client.copy_object(CopySource={"Bucket": source["Bucket"], "Key": source["Key"]}, **location)
        else:
            client.upload_file(str(folder / name), location["Bucket"], location["Key"])

    with ThreadPoolExecutor(_UPLOADS) as pool:
        for _ in pool.map(put, names):
            pass
    put(MARKER)


@functools.cache
def _client() -> S3Client:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(max_pool_connections=CONNECTIONS))


os.register_at_fork(after_in_child=_client.cache_clear)  # connections must not be shared with a loader worker


class _Location(TypedDict):
    Bucket: str
    Key: str


def _bucket_key(uri: str) -> _Location:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


@contextmanager
def _s3_errors(uri: str) -> Iterator[None]:
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (ClientError, S3UploadFailedError) as error:
        cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
        code = cause.response["Error"]["Code"] if isinstance(cause, ClientError) else ""
        if code in _MISSING:
            raise DataError(uri, found=f"no such object or bucket ({code})", mend="check the address") from error
        if code in _DENIED:
            raise DataError(uri, found=f"access denied ({code})", mend="check credentials and rights") from error
        raise PlatformError(uri, found=f"object store: {error}") from error
    except BotoCoreError as error:
        raise PlatformError(uri, found=f"object store: {error}", mend="check AWS_ENDPOINT_URL_S3") from error


@contextmanager
def _replacement(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when the block ends without an error."""
    with _disk_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o644)  # mkstemp's 0600 would hide it from another user's pod
            os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)


def append_text(path: Path, text: str) -> None:
    """Add `text` to the end of a local file, which is made if missing; killed in between, a part of it may stand.

    Raises:
        PlatformError: the disk is full.
    """
    with _disk_errors(str(path)), path.open("a", encoding="utf-8") as file:
        file.write(text)


@contextmanager
def _disk_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise PlatformError(
            uri, found=f"cannot write: {error.strerror}", mend="free space or choose another workspace"
        ) from error
