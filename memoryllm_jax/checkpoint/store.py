"""Checkpoints: parameters, optimizer, data position, config and tokenizer together, in numbered folders of the workdir.

Orbax saves in the background and gives a checkpoint its name only when it is whole; on gs://, where nothing can be
renamed, it writes a file commit_success.txt last.
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
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.tokenizer import Tokenizer

# Arrays are cut into chunks of this size on disk: reading one needs a chunk's memory beside the array's own.
_CHUNK_BYTES = 64 << 20


def describe(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> dict:
    """The JSON that is saved beside the arrays. The data position is not in it: it is the step, the folder's name."""
    return {"config": dataclasses.asdict(config), "data": {"digest": dataset.digest}, "tokenizer": tokenizer.to_json()}


def folder(workdir: str) -> str:
    """The absolute path or gs:// URL of a workdir. Raises: ArgumentError for a URL that Orbax cannot write to."""
    if storage.is_url(workdir) and not workdir.startswith("gs://"):
        raise ArgumentError("workdir", f"expected a folder on a disk or gs://BUCKET/FOLDER, found {workdir}")
    return storage.absolute(workdir)


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      keep: number of newest checkpoints that stay when a new one is saved.
      keep_every: checkpoints of steps that this number divides stay too; 0 for none.
      read_only: nothing is written or removed.
    Raises: UserError, also for errors of a save in the background: at the next `save`, `check` or `wait`.
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
        """Removes checkpoints on gs:// that were cut off.

        Orbax's own clean-up would remove every folder without commit_success.txt, also those of other programs.
        """
        fs, root = storage.filesystem(self.workdir)
        if not fs.exists(root):
            return
        for path in fs.ls(root, detail=False):
            if os.path.basename(path).isdigit() and not fs.exists(f"{path}/commit_success.txt"):
                fs.rm(path, recursive=True)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, in rising order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, description: dict) -> None:
        """Starts to save in the background; returns when the arrays are copied off the devices.

        Args:
          state: tree of arrays.
          description: as of `describe`.
        """
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=chunks), description=ocp.args.JsonSave(description)
        )
        with self._saving():
            self._manager.save(step, args=args)

    def check(self) -> None:
        """Raises the error of a background save, if it had one."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until the last save is on disk. Raises its error, if it had one."""
        with self._saving():
            self._manager.wait_until_finished()
        self.check()

    @contextlib.contextmanager
    def _saving(self):
        """Turns an error of Orbax into a UserError that names the newest good checkpoint, and removes the half save."""
        try:
            yield
        except Exception as error:
            _raise_if_lost_peer(error)
            last_good = self.last_good()
            with contextlib.suppress(Exception):
                self.close()
            if not storage.is_url(self.workdir):
                for name in os.listdir(self.workdir):
                    if ".orbax-checkpoint-tmp" in name:
                        shutil.rmtree(os.path.join(self.workdir, name), ignore_errors=True)
            reason = _one_line(error)
            if "No space left" in str(error):
                reason = "no space left on the device"
            raise UserError(f"{self.workdir}: saving a checkpoint failed: {reason}; {last_good}") from error

    def last_good(self) -> str:
        """A clause for error messages that names the newest complete checkpoint. Waits for a save in the background."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        try:
            self._manager.reload()
        except Exception as error:  # a storage service that cannot be reached
            return f"{self.workdir} cannot be read: {storage.reason(error)}"
        step = self._manager.latest_step()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is {self.workdir}/{step}"

    def description(self, step: int) -> dict:
        """The description that was saved with a step. Raises: UserError."""
        with self._reading(step):
            args = ocp.args.Composite(description=ocp.args.JsonRestore())
            return self._manager.restore(step, args=args)["description"]

    def restore(self, step: int, shapes):
        """The state of a step, on the devices that `shapes` names; it may have been saved from others.

        Args:
          shapes: tree of jax.ShapeDtypeStruct with shardings. Padding differs between meshes: what is saved is cut
            or filled with zeros to these shapes.
        Raises: UserError.
        """
        with self._reading(step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes, strict=False))
            return self._manager.restore(step, args=args)["state"]

    def restore_leaf(self, step: int, path, shape: jax.ShapeDtypeStruct) -> jax.Array:
        """One parameter, cut or padded to the shape and in the dtype and sharding that `shape` names.

        Args:
          path: of the parameter in the tree of parameters, as `jax.tree_util` gives it.
        Raises: UserError.
        """
        how = ocp.checkpoint_utils.construct_restore_args(shape)
        return self._restore_one(step, path, dataclasses.replace(how, strict=False))  # lets the shape differ

    def restore_on_host(self, step: int, path) -> np.ndarray:
        """One parameter in host memory, as it was saved: with the padding of the mesh it was trained on.

        Args:
          path: as of `restore_leaf`.
        Raises: UserError.
        """
        return self._restore_one(step, path, ocp.RestoreArgs(restore_type=np.ndarray))

    def _restore_one(self, step, path, how):
        for key in reversed(("params", *(key.key for key in path))):
            how = {key: how}
        item = jax.tree.map(lambda _: 0, how)  # only names the leaf: the checkpoint holds more of them
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        with self._reading(step), ocp.PyTreeCheckpointer() as reader:
            return jax.tree.leaves(reader.restore(os.path.join(self.workdir, str(step), "state"), args=args))[0]

    @contextlib.contextmanager
    def _reading(self, step):
        try:
            yield
        except Exception as error:
            _raise_if_lost_peer(error)
            raise UserError(f"{self.workdir}/{step}: cannot be read as a checkpoint: {_one_line(error)}") from error

    def close(self) -> None:
        """Waits for a save in the background. May be called twice."""
        if not self._closed:
            self._closed = True
            self._manager.close()


def _one_line(error):
    return " ".join(str(error).split())[:500]


def _raise_if_lost_peer(error):
    """With several processes: raises the JAX error, wrapped by Orbax, that says that another process has ended."""
    if jax.process_count() == 1:
        return
    while error is not None:
        if hosts.is_lost_peer(error):
            raise error
        error = error.__cause__ or error.__context__


def check_matches(saved: dict, current: dict, where: str) -> None:
    """Refuses to resume from a checkpoint of another run. Raises: UserError that names each field that differs.

    Args:
      saved, current: descriptions, as of `describe`.
      where: the checkpoint, for the message.
    """
    before, now = _fields(saved), _fields(current)
    different = [
        f"{field}: {before[field]!r} in the checkpoint, {now[field]!r} in this run"
        for field in now
        if before[field] != now[field] and field not in config.RESUMABLE_FIELDS
    ]
    if different:
        raise UserError(f"{where} is of another run: {'; '.join(different)}; use another workdir or the same settings")


def _fields(description):
    fields = config.flatten(config.from_saved(description["config"]))
    return fields | {"tokenizer": description["tokenizer"]["digest"], "data": description["data"]["digest"]}
