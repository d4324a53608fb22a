"""The folder of overlays that requests name, and where the page keeps edits."""

import os
import re
import stat

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.recent import Recent
from memoryllm_jax.tol.memory import Memory
from memoryllm_jax.tol.overlay import Overlay

_SUFFIX = ".safetensors"
_NAME = re.compile("[A-Za-z0-9_-]{1,100}")
_EXPECTED = "expected a name of 1 to 100 letters, digits, - and _"
_CACHE_BYTES = 256 << 20  # of overlays that were read


class OverlayFolder:
    """Overlays by name: the overlay NAME is the file NAME.safetensors of the folder.

    Only regular files count. A symbolic link is none, so that no request reads a file outside the folder.

    Args:
      path: the folder.
      memory: what the overlays edit.
    """

    def __init__(self, path: str, memory: Memory):
        self.path, self._memory = path, memory
        self._recent: Recent[tuple, Overlay] = Recent(_CACHE_BYTES)

    def names(self) -> list[str]:
        """The names of all overlays, in alphabetical order. Raises: UserError if the folder cannot be read."""
        with storage.user_errors(self.path), os.scandir(self.path) as entries:
            files = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
        names = [file.removesuffix(_SUFFIX) for file in files if file.endswith(_SUFFIX)]
        return sorted(name for name in names if _NAME.fullmatch(name))

    def open(self, name: str) -> Overlay:
        """The overlay of this name. Do not change it: others are given the same one.

        Raises: ApiError 404 if there is none, 400 if the name or the file cannot be used.
        """
        version = self._version(name)
        if version is None:
            raise ApiError(
                404,
                f"overlay: expected one of those that GET /api/overlays lists, found {name!r}",
                "overlay",
                "overlay_not_found",
            )
        # A file that is replaced has another version, so that the old content is not used again.
        return self._recent.get((name, *version), lambda: self._open(name), bytes_of)

    def keep(self, name: str, overlay: Overlay, replace: bool) -> None:
        """Writes an overlay. Other servers and commands see it as a whole or not at all.

        Raises: ApiError 400 for the name, 409 if there is one of this name and `replace` is False; UserError if the
          folder cannot be written to.
        """
        path = self._path(name)
        if os.path.lexists(path):
            problem = ""
            if self._version(name) is None:
                problem = f"expected a name that is free, found {name!r}, which is no regular file"
            elif not replace:
                problem = f'expected a name that is free, or "replace": true, found {name!r}'
            if problem:
                raise ApiError(409, f"overlay: {problem}", "overlay", "overlay_exists")
        overlay.save(path)

    def _open(self, name):
        path = self._path(name)
        try:
            return Overlay.open(path, self._memory)
        except UserError as error:
            problem = str(error).replace(path, repr(name))  # requests do not learn paths of the server
            raise ApiError(400, f"overlay: {problem}", "overlay", "overlay_unusable") from error

    def _path(self, name):
        if not _NAME.fullmatch(name):
            raise ApiError(400, f"overlay: {_EXPECTED}, found {name[:60]!r}", "overlay")
        return os.path.join(self.path, f"{name}{_SUFFIX}")

    def _version(self, name):
        """Numbers that change when the file is written anew; None if there is no such regular file."""
        try:
            found = os.lstat(self._path(name))
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if stat.S_ISREG(found.st_mode) else None


def bytes_of(overlay: Overlay) -> int:
    """Bytes of an overlay's arrays."""
    arrays = [edit.rows if edit.gives_rows else edit.coefficients for edit in overlay.edits]
    return sum(array.nbytes for array in arrays)
