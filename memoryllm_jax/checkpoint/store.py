"""Checkpoints in numbered folders of the workdir: the training state, with a description (description.py) as JSON.

Orbax saves in the background. It gives a checkpoint its final name only when it is complete; on gs://, where nothing
can be renamed, it writes a file commit_success.txt last.
"""

import contextlib
import os
import shutil
import time

import jax
import msgspec
import orbax.checkpoint as ocp

from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.checkpoint import digest
from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.checkpoint.reader import ITEM, Reader, raise_if_lost_peer
from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, one_line

# Arrays are stored in chunks of this size: reading an array takes the memory of one chunk besides the array's own.
_CHUNK_BYTES = 64 << 20
# In the name of a folder on a disk until it is complete: Orbax gives it, the same in 0.11.30 and 0.12.8 (pyproject.toml
# allows this range). There is no function to use instead: utils.is_tmp_checkpoint and its like are marked as
# deprecated, without a public successor.
_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX


class Checkpoints:
    """The checkpoints of one workdir that a run writes to.

    Args:
      workdir: local folder or gs:// URL.
      keep: number of newest checkpoints that are kept when a new one is saved.
      keep_every: checkpoints whose step this number divides are kept too; 0 keeps no others.
    Raises: UserError. An error of a save in the background is raised by the next `save`, `check` or `wait`.
    """

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0):
        self.workdir = description_lib.folder(workdir)
        remote = storage.is_url(workdir)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=not remote
        )
        with storage.user_errors(self.workdir, "a folder for checkpoints"):
            if remote and jax.process_index() == 0:
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(self.workdir, options=options)
        self._reader = Reader(self.workdir)
        self._closed = False

    def _remove_unfinished(self):
        """Removes checkpoints on gs:// whose save was interrupted.

        Orbax's own clean-up would remove every folder without commit_success.txt, including those of other programs.
        """
        fs, root = storage.filesystem(self.workdir)
        if not fs.exists(root):
            return
        for path in fs.ls(root, detail=False):
            if os.path.basename(path).isdigit() and not fs.exists(f"{path}/{description_lib.COMMITTED}"):
                fs.rm(path, recursive=True)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, description: Description) -> None:
        """Starts a save in the background, and returns when the arrays have been copied off the devices.

        Args:
          step: number of the checkpoint.
          state: tree of arrays, with the parameters under "params".
          description: what is saved beside them; the digests of the arrays are added to it.
        Raises: UserError, also for an error of the last save.
        """
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        with self._saving():
            if not storage.is_url(self.workdir) and not os.path.isdir(self.workdir):
                raise FileNotFoundError("the folder was removed while the run was using it")
            described = msgspec.structs.replace(description, digests=digest.of_tree(state))
            args = ocp.args.Composite(
                **{
                    ITEM: ocp.args.StandardSave(state, save_args=chunks),
                    description_lib.ITEM: ocp.args.JsonSave(description_lib.to_json(described)),
                }
            )
            self._manager.save(step, args=args)

    def check(self) -> None:
        """Raises: UserError if a save in the background has failed."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until the last save is on disk. Raises: UserError if it failed."""
        with self._saving():
            self._manager.wait_until_finished()
        self.check()

    @contextlib.contextmanager
    def _saving(self):
        """Turns an error of a save into a UserError that names the newest complete checkpoint.

        Closes the checkpoints and removes what the failed save has written.
        """
        try:
            yield
        except Exception as error:
            raise_if_lost_peer(error)
            last_good = self.last_good()
            self.close()
            self._remove_partial()
            reason = one_line(error, 500)
            if "No space left" in str(error):
                reason = "no space left on the device"
            raise UserError(f"{self.workdir}: saving a checkpoint failed: {reason}; {last_good}") from error

    def _remove_partial(self):
        """Removes what a failed save has written to a folder on a disk."""
        if storage.is_url(self.workdir) or not os.path.isdir(self.workdir):
            return
        for name in os.listdir(self.workdir):
            path = os.path.join(self.workdir, name)
            # Writes that were under way when the save failed may add files to the folder while it is removed.
            tries = 20 if _UNFINISHED in name else 0
            while tries and os.path.exists(path):
                shutil.rmtree(path, ignore_errors=True)
                tries -= 1
                time.sleep(0.1)

    def last_good(self) -> str:
        """A clause for error messages that names the newest complete checkpoint. First waits for a running save."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        try:
            self._manager.reload()  # its list of steps may hold one whose save has failed
        except Exception as error:  # a storage service cannot be reached
            return f"{self.workdir} cannot be read: {storage.reason(error)}"
        step = self._manager.latest_step()
        if step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self.workdir}/{step}"

    def description(self, step: int) -> Description:
        """The description that was saved with the checkpoint of a step. Raises: UserError."""
        return self._reader.description(step)

    def restore(self, step: int, shapes):
        """The state of a step (`Reader.restore`). Raises: UserError."""
        return self._reader.restore(step, shapes)

    def close(self) -> None:
        """Waits for a save in the background, and closes. May be called twice. Only `wait` raises errors of a save."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):  # of a save; it would hide the error that ends the run
                self._manager.close()
            self._reader.close()
