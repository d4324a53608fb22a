"""Checkpoints in numbered folders of the workdir: the training state, with config, tokenizer and data digest as JSON.

Orbax saves in the background. It gives a checkpoint its final name only when it is complete; on gs://, where nothing
can be renamed, it writes a file commit_success.txt last.
"""

import contextlib
import dataclasses
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from memoryllm_jax import config
from memoryllm_jax.common import hosts, storage
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.tokenizer import Tokenizer

# Arrays are stored in chunks of this size: reading an array takes the memory of one chunk besides the array's own.
_CHUNK_BYTES = 64 << 20
# Names that Orbax gives, the same in 0.11.30 and 0.12.8 (pyproject.toml allows this range). There is no function to use
# instead: utils.is_tmp_checkpoint and its like are marked as deprecated, without a public successor.
_COMMITTED = ocp.path.atomicity_types.COMMIT_SUCCESS_FILE  # a file that is written last, on gs://
_UNFINISHED = ocp.path.atomicity_types.TMP_DIR_SUFFIX  # in the name of a folder on a disk until it is complete


def describe(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> dict:
    """The JSON that is saved beside the arrays: config, digest of the data and tokenizer.

    The position in the data is not in it, as it follows from the step, which is the folder's name.
    """
    return {"config": dataclasses.asdict(config), "data": {"digest": dataset.digest}, "tokenizer": tokenizer.to_json()}


def folder(workdir: str) -> str:
    """The absolute path or gs:// URL of a workdir. Raises: ArgumentError for a URL that Orbax cannot write to."""
    if storage.is_url(workdir) and not workdir.startswith("gs://"):
        raise ArgumentError("workdir", f"expected a folder on a disk or gs://BUCKET/FOLDER, found {workdir}")
    return storage.absolute(workdir)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: local folder or gs:// URL.
      keep: number of newest checkpoints that are kept when a new one is saved.
      keep_every: checkpoints whose step this number divides are kept too; 0 keeps no others.
      read_only: if true, nothing is written or removed.
    Raises: UserError. An error of a save in the background is raised by the next `save`, `check` or `wait`.
    """

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0, read_only: bool = False):
        self.workdir = folder(workdir)
        remote = storage.is_url(workdir)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=keep_every or None,
            cleanup_tmp_directories=not read_only and not remote,
            read_only=read_only,
        )
        with storage.user_errors(self.workdir, "a folder for checkpoints"):
            if remote and not read_only and jax.process_index() == 0:
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(self.workdir, options=options)
        self._closed = False

    def _remove_unfinished(self):
        """Removes checkpoints on gs:// whose save was interrupted.

        Orbax's own clean-up would remove every folder without commit_success.txt, including those of other programs.
        """
        fs, root = storage.filesystem(self.workdir)
        if not fs.exists(root):
            return
        for path in fs.ls(root, detail=False):
            if os.path.basename(path).isdigit() and not fs.exists(f"{path}/{_COMMITTED}"):
                fs.rm(path, recursive=True)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, description: dict) -> None:
        """Starts a save in the background, and returns when the arrays have been copied off the devices.

        Args:
          step: number of the checkpoint.
          state: tree of arrays, with the parameters under "params".
          description: JSON to save beside them (`describe`).
        Raises: UserError, also for an error of the last save.
        """
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=chunks), description=ocp.args.JsonSave(description)
        )
        with self._saving():
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
            _raise_if_lost_peer(error)
            last_good = self.last_good()
            with contextlib.suppress(Exception):
                self.close()
            if not storage.is_url(self.workdir):
                for name in os.listdir(self.workdir):
                    if _UNFINISHED in name:
                        shutil.rmtree(os.path.join(self.workdir, name), ignore_errors=True)
            reason = one_line(error, 500)
            if "No space left" in str(error):
                reason = "no space left on the device"
            raise UserError(f"{self.workdir}: saving a checkpoint failed: {reason}; {last_good}") from error

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

    def description(self, step: int) -> dict:
        """The description that was saved with the checkpoint of a step. Raises: UserError."""
        with self._reading(step):
            args = ocp.args.Composite(description=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["description"]

    def restore(self, step: int, shapes):
        """The state of a step, which may have been saved from another mesh.

        Args:
          step: number of the checkpoint.
          shapes: tree of jax.ShapeDtypeStruct with shardings, which the result has. Padding differs between meshes, so
            the saved arrays are cut or filled with zeros to these shapes.
        Raises: UserError.
        """
        with self._reading(step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes, strict=False))
            return self._manager.restore(step, args=args)["state"]

    def restore_leaf(self, step: int, path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        """Reads one parameter onto the devices.

        Args:
          step: number of the checkpoint.
          path: path of the parameter in the tree of parameters, as `jax.tree_util` gives it.
          shape: shape, dtype and sharding of the result, which is cut or filled with zeros to this shape.
        Raises: UserError.
        """
        how = ocp.checkpoint_utils.construct_restore_args(shape)
        # strict=False lets Orbax cut and fill arrays of another shape.
        return self._restore_one(step, path, dataclasses.replace(how, strict=False))

    def restore_on_host(self, step: int, path) -> np.ndarray:
        """Reads one parameter into host memory as it was saved, with the padding of the mesh it was trained on.

        Args:
          step: number of the checkpoint.
          path: path of the parameter, as in `restore_leaf`.
        Raises: UserError.
        """
        return self._restore_one(step, path, ocp.RestoreArgs(restore_type=np.ndarray))

    def _restore_one(self, step, path, restore_args):
        # Orbax takes trees like the saved one: here, nested dicts that lead to this one leaf.
        tree = restore_args
        for key in reversed(("params", *(key.key for key in path))):
            tree = {key: tree}
        item = jax.tree.map(lambda _: 0, tree)  # only the leaf's place counts, not its value
        args = ocp.args.PyTreeRestore(item=item, restore_args=tree, partial_restore=True)
        with self._reading(step), ocp.PyTreeCheckpointer() as reader:
            return jax.tree.leaves(reader.restore(os.path.join(self.workdir, str(step), "state"), args=args))[0]

    @contextlib.contextmanager
    def _reading(self, step):
        """Turns an error of reading a checkpoint into a UserError that names it."""
        try:
            yield
        except Exception as error:
            _raise_if_lost_peer(error)
            raise UserError(f"{self.workdir}/{step}: cannot be read as a checkpoint: {one_line(error, 500)}") from error

    def close(self) -> None:
        """Waits for a save in the background, and closes. May be called twice."""
        if not self._closed:
            self._closed = True
            self._manager.close()


def _raise_if_lost_peer(error):
    """Among several processes, raises the JAX error, wrapped by Orbax, which says that another process has ended.

    It must not become a UserError: the launcher restarts a run that lost a peer, but not one with a user's mistake.
    """
    if jax.process_count() == 1:
        return
    while error is not None:
        if hosts.is_lost_peer(error):
            raise error
        error = error.__cause__ or error.__context__


def check_matches(saved: dict, current: dict, where: str) -> None:
    """Checks that a run may resume from a checkpoint: all fields but config.RESUMABLE_FIELDS must be the same.

    Args:
      saved: description in the checkpoint.
      current: description of this run (`describe`).
      where: path of the checkpoint, for the error message.
    Raises: UserError that names each field that differs.
    """
    before = _fields(saved)
    now = _fields(current)
    different = [
        f"{field}: {before[field]!r} in the checkpoint, {now[field]!r} in this run"
        for field in now
        if before[field] != now[field] and field not in config.RESUMABLE_FIELDS
    ]
    if different:
        raise UserError(f"{where} is of another run: {'; '.join(different)}; use another workdir or the same settings")


def _fields(description):
    """{name: value} of the config's fields, and the digests of tokenizer and data."""
    fields = config.flatten(config.from_saved(description["config"]))
    return fields | {"tokenizer": description["tokenizer"]["digest"], "data": description["data"]["digest"]}
