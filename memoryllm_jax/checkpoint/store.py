"""Checkpoints: parameters, optimizer, data position, config and tokenizer together, in numbered folders of the workdir.

Orbax saves in the background and gives a checkpoint its name only when it is whole; on gs://, where nothing can be
renamed, it writes a file commit_success.txt last.
"""

import contextlib
import dataclasses
import os
import shutil
import sys
import threading
import traceback

import jax
import orbax.checkpoint as ocp
import tensorstore

from memoryllm_jax import config
from memoryllm_jax.common import hosts, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.config import Config
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.tokenizer import Tokenizer

_CHUNK_BYTES = 64 << 20  # of an array on disk: what reading it needs beside the array itself


def describe(config: Config, dataset: Dataset, tokenizer: Tokenizer) -> dict:
    """What is saved beside the arrays; the data position is the step, which names the folder."""
    return {"config": dataclasses.asdict(config), "data": {"digest": dataset.digest}, "tokenizer": tokenizer.to_json()}


def folder(workdir: str) -> str:
    """The workdir as Orbax takes it. Raises: UserError for a URL that Orbax does not write to."""
    if storage.is_url(workdir) and not workdir.startswith("gs://"):
        raise UserError(f"--workdir={workdir}: expected a folder on a disk or gs://BUCKET/FOLDER, as Orbax needs it")
    return storage.absolute(workdir)


class Checkpoints:
    """The checkpoints of one workdir. Every error of a save, also of one in the background, is a UserError."""

    def __init__(self, workdir: str, keep: int = 1, keep_every: int = 0, read_only: bool = False):
        self.workdir = folder(workdir)
        far = storage.is_url(workdir)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=keep_every or None,
            cleanup_tmp_directories=not read_only and not far,
            read_only=read_only,
        )
        with storage.user_errors(self.workdir, "a folder for checkpoints"):
            if far and not read_only and jax.process_index() == 0:
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(self.workdir, options=options)
        self._closed = False
        threading.excepthook, sys.unraisablehook = _quiet_threads, _quiet_callbacks

    def _remove_unfinished(self):
        """For Orbax's own clean-up, which on gs:// takes every folder that is no checkpoint for an unfinished one."""
        fs, root = storage.filesystem(self.workdir)
        for path in fs.ls(root, detail=False) if fs.exists(root) else []:
            if os.path.basename(path).isdigit() and not fs.exists(f"{path}/commit_success.txt"):
                fs.rm(path, recursive=True)

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state, description: dict) -> None:
        """Begins to save in the background; returns when the state has left the devices."""
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state, save_args=chunks), description=ocp.args.JsonSave(description)
        )
        self._guard(lambda: self._manager.save(step, args=args))

    def check(self) -> None:
        """Raises what a background save ran into."""
        self._guard(self._manager.check_for_errors)

    def wait(self) -> None:
        """Until the last save is on disk. Raises what it ran into."""
        self._guard(self._manager.wait_until_finished)
        self.check()

    def _guard(self, action):
        try:
            action()
        except Exception as error:
            _raise_if_lost_peer(error)
            last_good = self.last_good()
            with contextlib.suppress(Exception):
                self.close()
            for name in [] if storage.is_url(self.workdir) else os.listdir(self.workdir):
                if ".orbax-checkpoint-tmp" in name:
                    shutil.rmtree(os.path.join(self.workdir, name), ignore_errors=True)
            reason = " ".join(str(error).split())
            reason = "no space left on the device" if "No space left" in reason else reason[:500]
            raise UserError(f"{self.workdir}: saving a checkpoint failed: {reason}; {last_good}") from error

    def last_good(self) -> str:
        """A clause that names the newest whole checkpoint, once a save in the background has ended."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        try:
            self._manager.reload()
        except Exception as error:  # a storage service that cannot be reached
            return f"{self.workdir} cannot be read: {storage.reason(error)}"
        step = self._manager.latest_step()
        return "there is no checkpoint yet" if step is None else f"the last good checkpoint is {self.workdir}/{step}"

    def description(self, step: int) -> dict:
        return self._restore(step, description=ocp.args.JsonRestore())["description"]

    def restore(self, step: int, shapes):
        """The state of a step on the devices that `shapes` names, whatever devices it was saved from.

        Padding differs from mesh to mesh: it is cut off or filled with zeros.
        """
        return self._restore(step, state=ocp.args.StandardRestore(shapes, strict=False))["state"]

    def restore_leaf(self, step: int, path, shape: jax.ShapeDtypeStruct):
        """One parameter, by its tree path, in the dtype and on the devices that `shape` names."""
        tree = shape
        for key in reversed(path):
            tree = {key.key: tree}
        tree = {"params": tree}
        how = ocp.checkpoint_utils.construct_restore_args(tree)
        how = jax.tree.map(lambda leaf: dataclasses.replace(leaf, strict=False), how)  # padding is cut off
        args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)

        def read():
            with ocp.PyTreeCheckpointer() as reader:
                return reader.restore(os.path.join(self.workdir, str(step), "state"), args=args)

        return jax.tree.leaves(self._reading(step, read))[0]

    def open_leaf(self, step: int, path):
        """One parameter as it lies in the checkpoint, padding included, of which slices can be read.

        By TensorStore, in the form that Orbax writes: `save` asks for no other.
        """
        folder = os.path.join(self.workdir, str(step), "state")
        base = folder if storage.is_url(folder) else f"file://{folder}"
        name = ".".join(["params", *(key.key for key in path)])
        spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}
        # One chunk at a time is decoded, and none is kept.
        context = tensorstore.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})
        return self._reading(step, lambda: tensorstore.open(spec, read=True, context=context).result())

    def _restore(self, step, **items):
        return self._reading(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**items)))

    def _reading(self, step, read):
        try:
            return read()
        except Exception as error:
            _raise_if_lost_peer(error)
            reason = " ".join(str(error).split())[:500]
            raise UserError(f"{self.workdir}/{step}: cannot be read as a checkpoint: {reason}") from error

    def close(self) -> None:
        """Waits for what is being saved. May be called twice."""
        if not self._closed:
            self._closed = True
            self._manager.close()


def _raise_if_lost_peer(error):
    """Of several processes: what JAX raised within Orbax when another one has ended."""
    while error is not None and jax.process_count() > 1:
        if hosts.is_lost_peer(error):
            raise error
        error = error.__cause__ or error.__context__


# An error of Orbax's threads reaches the main thread too, which tells of it in one sentence; these keep the
# threads from telling of it as well, and TensorStore's late callbacks from telling that nobody waits for them.
def _quiet_threads(args, default=threading.excepthook):
    names = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(args.exc_traceback)]
    if not any("orbax" in name or "tensorboardX" in name for name in names):
        default(args)


def _quiet_callbacks(unraisable, default=sys.unraisablehook):
    if str(unraisable.exc_value) != "Event loop is closed":
        default(unraisable)


def check_matches(saved: dict, current: dict, where: str) -> None:
    """Refuses to go on from a checkpoint of another run. Raises: UserError that names each field that differs."""
    before = config.flatten(config.from_saved(saved["config"]))
    now = config.flatten(config.from_saved(current["config"]))
    before |= {"tokenizer": saved["tokenizer"]["digest"], "data": saved["data"]["digest"]}
    now |= {"tokenizer": current["tokenizer"]["digest"], "data": current["data"]["digest"]}
    different = [
        f"{field}: {before[field]!r} in the checkpoint, {now[field]!r} in this run"
        for field in now
        if before[field] != now[field] and field not in config.RESUMABLE_FIELDS
    ]
    if different:
        raise UserError(f"{where} is of another run: {'; '.join(different)}; use another workdir or the same settings")
