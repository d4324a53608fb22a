"""Small file habits that several commands share: whole-file writes, folder locks, checksums."""

import fcntl
import hashlib
import json
import os
import socket

from memoryllm_jax.cli import UserError


def write_json(path: str, tree) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    write_bytes(path, (json.dumps(tree, indent=1) + "\n").encode())


def write_bytes(path: str, data: bytes) -> None:
    part = f"{path}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
        os.replace(part, path)
    except OSError as error:
        if os.path.exists(part):
            os.remove(part)
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error


def read_json(path: str, what: str):
    """Raises: UserError that names the file and what was expected of it."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: expected {what}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: expected {what}, found invalid JSON: {error}") from error


def sha256(path: str) -> str:
    with open(path, "rb") as file:
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
