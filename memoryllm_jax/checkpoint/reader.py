"""Reads checkpoints: descriptions, and parameters one at a time, each checked against the digest saved with it."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.checkpoint import digest, host_arrays
from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.common import devices, hosts
from memoryllm_jax.common.errors import UserError, one_line
from memoryllm_jax.common.progress import Progress

ITEM = "state"  # name of the arrays' folder in that of a checkpoint
# Along an axis, padding is less than the number of devices that the axis is split over.
_MOST_PADDING = 4096


class DamageError(Exception):
    """An array in a checkpoint has other values than were saved. Its text names the array."""


class _Saved(NamedTuple):
    """The arrays of a checkpoint by name, in the order of the tree: shapes, names in the database; and the tree."""

    shapes: dict[str, tuple[int, ...]]
    stored_names: dict[str, str]
    tree: jax.tree_util.PyTreeDef


class Reader:
    """Reads the checkpoints of a workdir; it writes nothing.

    Args:
      workdir: absolute path or URL, as `description.folder` returns it.
    Raises: UserError if the accelerator cannot be used. The methods raise UserError for what cannot be read or is
      damaged; it names the newest good checkpoint.
    """

    def __init__(self, workdir: str):
        self.workdir = workdir
        devices.find()  # before Orbax asks for devices: only the first to ask learns why JAX finds none
        self._arrays = ocp.PyTreeCheckpointer()
        self._states = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        self._context = host_arrays.new_context()
        self._descriptions: dict[int, Description] = {}
        self._trees: dict[int, _Saved] = {}
        self._checked: set[tuple[int, str]] = set()  # (step, array) that were read into host memory and are whole

    def description(self, step: int) -> Description:
        """The description of a checkpoint."""
        if step not in self._descriptions:
            try:
                self._descriptions[step] = description_lib.read(self.workdir, step)
            except UserError as error:
                raise UserError(f"{error}; {self.newest_good(step)}") from error
        return self._descriptions[step]

    def check_shapes(self, step: int, wanted: dict[str, tuple[int, ...]]) -> None:
        """Checks that a checkpoint has these arrays, before memory is allocated for them.

        Args:
          wanted: {name of an array: its shape without padding}; the saved one may have some padding.
        """
        with self.errors(step):
            shapes = self._saved(step).shapes
            for name, shape in wanted.items():
                found = shapes.get(name)
                if found is None:
                    raise DamageError(f"expected an array {name}, found none")
                padding = [more - size for more, size in zip(found, shape, strict=False)]
                if len(found) != len(shape) or not all(0 <= more <= _MOST_PADDING for more in padding):
                    raise DamageError(f"{name}: expected the shape {shape}, found {tuple(found)}")

    def leaf(self, step: int, path, like: jax.ShapeDtypeStruct) -> jax.Array:
        """Reads one parameter onto the devices.

        The digest is that of the saved values, so they are read in their own dtype and then converted.

        Args:
          step: number of the checkpoint.
          path: path of the parameter in the tree of parameters, as `jax.tree_util` gives it.
          like: shape, dtype and sharding of the result, which is cut or filled with zeros to this shape.
        """
        how = ocp.checkpoint_utils.construct_restore_args(like)
        with self.errors(step):
            # strict=False lets Orbax cut and fill arrays of another shape.
            value = self._restore(step, _name(path), dataclasses.replace(how, strict=False, dtype=None))
            self._check(step, _name(path), value)
        if value.dtype == like.dtype:
            return value
        return jax.jit(lambda x: x.astype(like.dtype), out_shardings=like.sharding)(value)

    def restore(self, step: int, shapes):
        """The state of a step, which may have been saved from another mesh. Its digests are checked.

        Args:
          step: number of the checkpoint.
          shapes: tree of jax.ShapeDtypeStruct with shardings, which the result has. Padding differs between meshes, so
            the saved arrays are cut or filled with zeros to these shapes.
        """
        saved = self.description(step).digests
        with self.errors(step):
            args = ocp.args.StandardRestore(shapes, strict=False)
            state = self._states.restore(self._path(step), args=args)
            if saved is not None:  # version 0.1.0 saved none
                check_digests(digest.of_tree(state), saved)
            return state

    def leaf_on_host(self, step: int, path) -> np.ndarray:
        """Reads one parameter into host memory as it was saved, with the padding of the mesh it was trained on.

        Args:
          step: number of the checkpoint.
          path: path of the parameter, as in `leaf`.
        """
        return self._on_host(step, _name(path))

    def arrays(
        self,
        step: int,
        wanted: Mapping[str, tuple[int, ...] | None],
        layers: Callable[[str], bool] = lambda name: False,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Reads arrays into host memory, in their saved dtypes: the next one while the caller uses the last one.

        So there is memory for two arrays besides those that the caller keeps.

        Args:
          step: number of the checkpoint.
          wanted: {name of an array: its shape}, to which the array is cut or filled with zeros; None: as it was saved.
          layers: whether the first axis of an array is that of layers, which will be used one by one.
        Yields: (name, array) in the order of `wanted`.
        """
        reading = None
        for name in [*wanted, None]:
            following = None
            if name is not None:
                with self.errors(step):
                    stored_name = self._found(step, name)
                    read = host_arrays.start(self._context, self._path(step), stored_name, wanted[name], layers(name))
                    following = name, read
            if reading is not None:
                yield reading[0], self._whole(step, *reading)
            reading = following

    def _whole(self, step, name, read):
        """The array, once it is read and its digest is found to be the saved one."""
        with self.errors(step):
            read.done.result()
            if (step, name) not in self._checked:  # export reads an array again for each file
                self._check(step, name, read.array)
                self._checked.add((step, name))
        return read.array

    def _on_host(self, step, name):
        ((_, array),) = self.arrays(step, {name: None})
        return array

    def _restore(self, step, name, restore_args):
        # Orbax takes trees like the saved one, with a placeholder for each array that is not to be read.
        self._found(step, name)
        saved = self._saved(step)
        items = [0 if other == name else ocp.PLACEHOLDER for other in saved.shapes]
        args = ocp.args.PyTreeRestore(
            item=saved.tree.unflatten(items), restore_args=saved.tree.unflatten([restore_args] * len(items))
        )
        restored = self._arrays.restore(self._path(step), args=args)
        return jax.tree.leaves(restored)[list(saved.shapes).index(name)]

    def _saved(self, step):
        """The tree of a checkpoint's arrays, read once."""
        if step not in self._trees:
            metadata = self._arrays.metadata(self._path(step)).item_metadata
            if metadata is None:
                raise DamageError(f"expected a readable list of the arrays in {ITEM}/_METADATA, found none")
            flat, structure = jax.tree_util.tree_flatten_with_path(metadata.tree)
            leaves = {digest.array_name(path): leaf for path, leaf in flat}
            shapes = {name: leaf.shape for name, leaf in leaves.items()}
            self._trees[step] = _Saved(shapes, {name: leaf.name for name, leaf in leaves.items()}, structure)
        return self._trees[step]

    def _found(self, step, name):
        """The name of an array in the database. Raises: DamageError if there is no such array."""
        names = self._saved(step).stored_names
        if name not in names:
            raise DamageError(f"expected an array {name}, found none")
        return names[name]

    def _path(self, step):
        return os.path.join(self.workdir, str(step), ITEM)

    def _check(self, step, name, value):
        """Raises: DamageError if an array has another digest than the saved one. Version 0.1.0 saved none."""
        saved = self.description(step).digests
        if saved is not None:
            check_digests({name: digest.of(value)}, saved)

    @contextlib.contextmanager
    def errors(self, step: int) -> Iterator[None]:
        """Turns an error of reading a checkpoint into a UserError that names it, and the newest good one."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise_if_lost_peer(error)
            where = f"{self.workdir}/{step}"
            if isinstance(error, DamageError):
                problem = f"{where}: {error}"
            else:
                problem = f"{where}: cannot be read as a checkpoint: {one_line(error, 500)}"
            raise UserError(f"{problem}; {self.newest_good(step)}") from error

    def newest_good(self, damaged: int) -> str:
        """A clause for error messages that names the newest checkpoint whose arrays are all as saved.

        It reads whole checkpoints, one array at a time, and shows the progress.
        """
        with contextlib.suppress(UserError):  # the workdir may be what cannot be read
            steps = description_lib.steps(self.workdir)
            for step in reversed(steps):
                if step != damaged and self._is_good(step):
                    newer = [f"{self.workdir}/{other}" for other in steps if other > step]
                    to_use = f": to use it, move away {', '.join(newer)}" if newer else ""
                    return f"the newest good checkpoint is {self.workdir}/{step}{to_use}"
        return "no other checkpoint is known to be good"

    def _is_good(self, step):
        try:
            names = description_lib.read(self.workdir, step).digests or {}
            # On stderr, as what a command prints on stdout may be read by a program.
            label = f"check {self.workdir}/{step}"
            progress = Progress(label, len(names), "array", enabled=hosts.is_first(), stream=sys.stderr)
            with contextlib.closing(progress):
                for done, name in enumerate(names, 1):
                    self._on_host(step, name)
                    progress.update(done)
        # Whatever cannot be read is not good; Orbax and TensorStore raise many kinds of errors.
        except Exception as error:
            raise_if_lost_peer(error)
            return False
        return bool(names)

    def close(self) -> None:
        """Ends reading."""
        self._arrays.close()
        self._states.close()


def check_digests(found: dict[str, str], saved: dict[str, str]) -> None:
    """Compares digests of arrays with those saved. Raises: DamageError that names the first array that differs."""
    for name, text in found.items():
        if text != saved.get(name):
            kind, _, parameter = name.partition("/")
            what = f"parameter {parameter}" if kind == "params" else f"array {name}"
            expected = f"the digest {saved[name]}" if name in saved else "no such array"
            raise DamageError(f"{what} is damaged: expected {expected}, found {text}")


def raise_if_lost_peer(error: BaseException | None) -> None:
    """Among several processes, raises the JAX error, wrapped by Orbax, which says that another process has ended.

    It must not become a UserError: the launcher restarts a run that lost a peer, but not one with a user's mistake.
    """
    if error is not None and hosts.is_lost_peer(error):
        raise error


def _name(path):
    return f"params/{digest.array_name(path)}"
