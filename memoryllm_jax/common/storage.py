"""Files on local paths and on URLs that fsspec knows: atomic writes, checksums, and locks on folders.

gcsfs and s3fs retry transient errors (five times); what still fails becomes a UserError that names the URL.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from memoryllm_jax.common.errors import UserError, one_line

_PIECE = 1 << 20  # bytes of a file read at a time
_LOCK_TRIES = 100  # to lock a folder that another run is removing


def is_url(path: str) -> bool:
    return "://" in path


def absolute(path: str) -> str:
    """The absolute path; a URL without a slash at its end."""
    return path.rstrip("/") if is_url(path) else os.path.abspath(path)


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """(the file system of a path or URL, the path in the form that this file system expects). Raises: UserError."""
    if not is_url(path):  # not by fsspec's rules, in which "::" in a name would join two URLs
        return LocalFileSystem(), os.path.abspath(path)
    try:
        # TensorStore and other hosts write to the same folders, so a cached listing would be out of date.
        return fsspec.core.url_to_fs(path, use_listings_cache=False)
    except Exception as error:  # each package behind a kind of URL has its own errors; ImportError if it is missing
        raise UserError(f"{path}: {reason(error)}") from error


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def reason(error: Exception) -> str:
    """Why a file system, or the storage behind a URL, refused: the last part of an error message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # fsspec's file systems raise it without strerror
        return "no such file, folder or bucket"
    text = one_line(error, 300) or type(error).__name__
    package = re.search("gcsfs|s3fs", text)
    if isinstance(error, ImportError) and package:
        extra = {"gcsfs": "gcs", "s3fs": "s3"}[package[0]]
        return f"{text}: pip install 'memoryllm_jax[{extra}]'"
    return text


@contextlib.contextmanager
def user_errors(path: str, expected: str = "") -> Iterator[None]:
    """Turns errors of the storage into a UserError that names the path and what was expected there."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        wanted = f"expected {expected}: " if expected else ""
        raise UserError(f"{path}: {wanted}{reason(error)}") from error


@contextlib.contextmanager
def replaced(path: str) -> Iterator[str]:
    """Yields PATH.part, where the caller writes a local file or folder; at the end it is renamed to `path`.

    So `path` is complete or does not exist. On an error, PATH.part is removed. A folder also replaces an empty folder.
    Raises: UserError for an OSError.
    """
    part = f"{path}.part"
    try:
        yield part
        if os.path.isdir(part) and os.path.isdir(path):
            os.rmdir(path)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        if os.path.isdir(part):
            shutil.rmtree(part, ignore_errors=True)
        elif os.path.exists(part):
            os.remove(part)


def inside(folder: str, name: str, what: str, roots: tuple[str, ...] = ()) -> str:
    """The path of a file that another file names, such as an index: it must lie in the folder.

    Args:
      folder: local folder or URL.
      name: as it stands in the other file, relative to the folder.
      what: the other file and the field that holds the name, for the error message: "DIR/index.json: weight_map".
      roots: local folders beside `folder` in which a symbolic link may end too.
    Raises: UserError for an absolute name, a name that leaves the folder, or a symbolic link that does.
    """
    parts = name.replace("\\", "/").split("/")
    is_plain = name and "\0" not in name and not is_url(name) and not {"", ".", ".."} & set(parts)
    if not is_plain or os.path.isabs(name):
        raise UserError(f"{what}: expected the name of a file in {folder}, found {name[:200]!r}")
    path = os.path.join(folder, name)
    if is_url(folder):
        return path
    real = os.path.realpath(path)
    for root in (folder, *roots):
        if os.path.commonpath([os.path.realpath(root), real]) == os.path.realpath(root):
            return path
    raise UserError(f"{what}: expected a file in {folder}, found {name!r}, a symbolic link to {real}")


def write_json(path: str, tree) -> None:
    """Writes a JSON file atomically. Raises: UserError."""
    write_bytes(path, (json.dumps(tree, indent=1) + "\n").encode())


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file atomically: it is complete or does not exist. Raises: UserError."""
    if is_url(path):
        fs, name = filesystem(path)
        with user_errors(path, "a place to write to"):
            fs.pipe_file(name, data)  # an object in an object store becomes visible only when it is complete
        return
    with replaced(path) as part, open(part, "wb") as file:
        file.write(data)


def upload(path: str, url: str) -> None:
    """Copies a local file to a URL. Raises: UserError."""
    fs, name = filesystem(url)
    with user_errors(url, "a place to write to"):
        fs.put_file(path, name)


def read_bytes(path: str, expected: str) -> bytes:
    """The content of a file. Raises: UserError that names the file and what was expected there."""
    fs, name = filesystem(path)
    with user_errors(path, expected):
        return fs.cat_file(name)


def exists(path: str) -> bool:
    fs, name = filesystem(path)
    with user_errors(path):
        return fs.exists(name)


class Listed(NamedTuple):
    """A file in a folder.

    version: a text that changes when the file is written anew; "" where the storage does not say. On a disk, it is made
      of size and time of modification, which copying a file can keep while its bytes are damaged.
    """

    size: int
    version: str


def files(folder: str) -> dict[str, Listed]:
    """The files in a folder by name. Raises: UserError."""
    fs, name = filesystem(folder)
    with user_errors(folder, "a folder"):
        if is_local(fs):
            found = [(entry.name, entry.stat()) for entry in os.scandir(name) if entry.is_file()]
            return {file: Listed(stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}") for file, stat in found}
        entries = fs.ls(name, detail=True)
    return {
        os.path.basename(entry["name"]): Listed(entry["size"], _version(entry))
        for entry in entries
        if entry["type"] == "file"
    }


def _version(entry: dict) -> str:
    """The version of a file behind a URL."""
    tag = entry.get("etag") or entry.get("ETag")  # gcsfs and s3fs
    return f"{entry['size']} {tag}" if tag else ""


def names(folder: str) -> set[str]:
    """The names of all files and folders in a folder; none if there is no such folder. Raises: UserError."""
    fs, name = filesystem(folder)
    with user_errors(folder):
        try:
            entries = fs.ls(name, detail=False)
        except FileNotFoundError:
            return set()
    return {os.path.basename(entry.rstrip("/")) for entry in entries}


def remove(path: str) -> None:
    """Removes a file, if there is one. Raises: UserError."""
    fs, name = filesystem(path)
    with user_errors(path), contextlib.suppress(FileNotFoundError):
        fs.rm_file(name)


def sha256(path: str, step: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Args:
      step: called with the number of bytes after each piece of the file.
    Raises: UserError.
    """
    fs, name = filesystem(path)
    digest = hashlib.sha256()
    with user_errors(path, "a file"), fs.open(name, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            step(len(piece))
    return digest.hexdigest()


def lock_byte(fd: int, path: str, number: int) -> None:
    """Locks byte `number` of an open file for this process. Raises: UserError if another process holds the lock."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except OSError as error:
        raise _cannot_lock(path, error) from error


def lock_folder(path: str):
    """Creates a local folder if there is none, and locks it for this process.

    Returns: the open lock file. Keep a reference: closing or garbage-collecting it releases the lock.
    Raises: UserError if another process has locked the folder.
    """
    for _ in range(_LOCK_TRIES):
        try:
            return _locked_file(path)
        except (FileNotFoundError, FileExistsError) as error:  # perhaps `discard_lock` of another run is at work
            problem = error
        except OSError as error:
            problem = error
            break
    raise UserError(f"{path}: cannot be written: {problem.strerror}") from problem


def _locked_file(path: str):
    """The lock file of a folder, locked. Raises: UserError as `lock_folder`, and OSError where something is missing."""
    os.makedirs(path, exist_ok=True)
    name = os.path.join(path, ".lock")
    with contextlib.ExitStack() as on_error:
        # Not "w", which would erase the name of the process that holds the lock; the error message needs it.
        file = on_error.enter_context(open(name, "a+", encoding="utf-8"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise _cannot_lock(path, error, f" ({holder})") from error
        if not os.path.samestat(os.stat(name), os.fstat(file.fileno())):
            # It was removed after it was opened, and another one is there: a lock on this one means nothing.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        on_error.pop_all()
        return file


def _cannot_lock(path: str, error: OSError, holder: str = "") -> UserError:
    """Why a lock was refused: another process has it, or the file system has no locks."""
    if isinstance(error, BlockingIOError | PermissionError):
        return UserError(f"{path}: in use by another run{holder}")
    return UserError(
        f"{path}: cannot be locked against a second run, as the file system refuses locks ({error.strerror}); choose a "
        "folder elsewhere, or mount this one with locks (Lustre: the option flock; NFS: without nolock)"
    )


def release_lock(lock, path: str) -> None:
    """Unlocks a folder; if nothing but the lock file is in it, removes both."""
    if names(path) <= {".lock"}:
        discard_lock(lock, path)
    lock.close()


def discard_lock(lock, path: str) -> None:
    """Removes the lock file that `lock_folder` returned, and the folder if nothing else is in it, then unlocks."""
    with contextlib.suppress(OSError):  # not empty, or a folder that the user may not remove
        os.remove(os.path.join(path, ".lock"))
        os.rmdir(path)
    lock.close()


class Claim:
    """A mark in a folder on object storage, which has no locks: the folder belongs to the run that marked it last.

    The last run wins, so that a run can start again after it was preempted. The run before it ends at its next `check`,
    unless the storage is out of reach.
    """

    def __init__(self, path: str):
        self.path = f"{path}/.lock"
        self._text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4()}"
        write_bytes(self.path, self._text.encode())

    def check(self) -> None:
        """Raises: UserError if another run has claimed the folder since then."""
        found = read_bytes(self.path, "the mark of this run").decode()
        if found != self._text:
            raise UserError(f"{self.path}: another run has taken over ({found}), so this one ends")

    def discard(self) -> None:
        """Removes the mark of a run that wrote nothing else. Raises: UserError."""
        remove(self.path)
