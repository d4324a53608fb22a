"""Small file habits that several commands share, on local paths and on URLs that fsspec knows.

Whole-file writes, checksums, and which run a folder belongs to. fsspec's file systems of object stores retry what may
pass (gcsfs and s3fs five times); what is left becomes a UserError that names the URL.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import uuid

import fsspec
from fsspec.implementations.local import LocalFileSystem

from memoryllm_jax.common.errors import UserError


def is_url(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def filesystem(path: str):
    """(fsspec file system, path as it knows it). Raises: UserError, also where its package is missing."""
    try:
        return fsspec.core.url_to_fs(path, use_listings_cache=False)  # TensorStore and other hosts write there too
    except Exception as error:
        raise UserError(f"{path}: {reason(error)}") from error


def is_local(fs) -> bool:
    return isinstance(fs, LocalFileSystem)


def reason(error: Exception) -> str:
    """Why a file system or the storage behind a URL refused, as a clause."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return "no such file, folder or bucket"
    text = " ".join(str(error).split())[:300] or type(error).__name__
    extra = {"gcsfs": "gcs", "s3fs": "s3"}.get(next(iter(re.findall("gcsfs|s3fs", text)), ""))
    if isinstance(error, ImportError) and extra:
        return f"{text}: pip install 'memoryllm_jax[{extra}]'"
    return text


@contextlib.contextmanager
def told(path: str, expected: str = ""):
    """Turns what the storage raises into a UserError that names the path and what was expected of it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {expected and f'expected {expected}: '}{reason(error)}") from error


def write_json(path: str, tree) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    write_bytes(path, (json.dumps(tree, indent=1) + "\n").encode())


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file that is there whole or not at all. Raises: UserError."""
    if is_url(path):
        fs, name = filesystem(path)
        with told(path, "a place to write to"):
            return fs.pipe_file(name, data)
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def upload(path: str, url: str) -> None:
    fs, name = filesystem(url)
    with told(url, "a place to write to"):
        fs.put_file(path, name)


def read_bytes(path: str, what: str) -> bytes:
    """Raises: UserError that names the file and what was expected of it."""
    fs, name = filesystem(path)
    with told(path, what):
        return fs.cat_file(name)


def read_json(path: str, what: str):
    """Raises: UserError that names the file and what was expected of it."""
    try:
        return json.loads(read_bytes(path, what))
    except ValueError as error:
        raise UserError(f"{path}: expected {what}, found invalid JSON: {error}") from error


def exists(path: str) -> bool:
    fs, name = filesystem(path)
    with told(path):
        return fs.exists(name)


def sizes(folder: str) -> dict[str, int]:
    """{file name: bytes} of all files in a folder. Raises: UserError."""
    fs, name = filesystem(folder)
    with told(folder, "a folder"):
        return {os.path.basename(e["name"]): e["size"] for e in fs.ls(name, detail=True) if e["type"] == "file"}


def sha256(path: str) -> str:
    fs, name = filesystem(path)
    with told(path, "a file"), fs.open(name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_byte(fd: int, path: str, number: int) -> None:
    """Holds byte `number` of an open file for this process. Raises: UserError if another holds it."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(f"{path}: in use by another run") from error


def lock_folder(path: str):
    """Makes the folder and holds it for this process; keep the result alive. Raises: UserError if it is held."""
    name = os.path.join(path, ".lock")
    try:
        os.makedirs(path, exist_ok=True)
        file = open(name, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        raise UserError(f"{path}: in use by another run ({file.read().strip() or 'unknown'})") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


class Claim:
    """A folder on object storage, which has no locks: it belongs to the run that claimed it last.

    So a run that was preempted is never shut out when it starts again, and one that still lives ends at its next
    `check`, as far as it reaches the storage.
    """

    def __init__(self, path: str):
        self.path = f"{path}/.lock"
        self._text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4()}"
        write_bytes(self.path, self._text.encode())

    def check(self) -> None:
        """Raises: UserError if another run has claimed the folder since."""
        found = read_bytes(self.path, "the mark of this run").decode()
        if found != self._text:
            raise UserError(f"{self.path}: another run has taken over ({found}), so this one ends")
