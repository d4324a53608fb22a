"""One training run, from its newest checkpoint or the start, to its end."""

import contextlib
import dataclasses
import os
import time
from typing import NamedTuple

import jax

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.store import Checkpoints
from memoryllm_jax.checkpoint.warm_start import starting_params
from memoryllm_jax.common import hosts, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.hosts import STOPPED, StopSignal
from memoryllm_jax.config import Config
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.model import attention, sharding
from memoryllm_jax.training import summary
from memoryllm_jax.training.batches import TrainBatches, ValidationBatches, local_shards
from memoryllm_jax.training.feeder import Feeder
from memoryllm_jax.training.recorder import Recorder
from memoryllm_jax.training.step import Trainer
from memoryllm_jax.training.validation import Validation


def train(config: Config, workdir: str, devices: list[jax.Device] | None = None, profile: int = 0) -> int:
    """Trains from the newest checkpoint in the workdir, or from the start, to the end or a stop signal.

    Args:
      workdir: folder or gs:// URL for checkpoints and metrics. Only one run at a time may use it.
      devices: by default all.
      profile: steps to leave a trace of in the workdir.
    Returns: the exit code: 0, or hosts.STOPPED after a signal.
    Raises: UserError. As one process of several it ends the process instead.
    """
    workdir = store.folder(workdir)
    with contextlib.ExitStack() as at_exit:
        if hosts.is_first() and not storage.is_url(workdir):
            at_exit.enter_context(storage.lock_folder(workdir))
        stop = StopSignal()
        at_exit.callback(stop.restore)
        try:
            run = open_run(config, workdir, devices, at_exit)
            return _train(run, profile, stop, at_exit)
        except Exception as error:
            if hosts.is_out_of_memory(error):
                error = UserError(
                    f"out of memory: {' '.join(str(error).split())[:300]}; a larger config.accumulate or "
                    "config.model.remat=full needs less, more devices too; --dry_run tells how much"
                )
            if jax.process_count() == 1:
                raise error
            hosts.abandon(error)


class Run(NamedTuple):
    """A run at the step that it goes on from."""

    workdir: str
    config: Config  # completed by data and machine
    tokenizer: Tokenizer
    trainer: Trainer
    batches: TrainBatches
    validation_batches: ValidationBatches
    checkpoints: Checkpoints
    description: dict  # saved with each checkpoint
    start: int
    state: dict  # of the trainer, after `start` steps


def open_run(config: Config, workdir: str, devices: list[jax.Device] | None, at_exit: contextlib.ExitStack) -> Run:
    """Opens data, devices, checkpoints and state. Raises: UserError."""
    dataset = open_dataset(config, workdir)
    config = complete(config, dataset)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(config, mesh)
    tokenizer = dataset.tokenizer()
    if config.data.verify:
        dataset.verify(jax.process_index(), jax.process_count())
    trainer = Trainer(config, mesh)
    local = local_shards(trainer.batch_sharding, trainer.shards)
    batches = TrainBatches(config, dataset, trainer.shards, local)
    validation_batches = ValidationBatches(config, dataset, trainer.shards, local)
    description = store.describe(config, dataset, tokenizer)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    at_exit.callback(checkpoints.close)
    start = checkpoints.latest()
    if start == 0:
        raise UserError(
            f"{workdir}: expected a folder of a training run, found an imported model: "
            f"start from it in another one, with --config=configs/start.py:ARCHITECTURE@{workdir}"
        )
    if start is None:
        start, state = 0, trainer.init(jax.random.key(config.seed))
        if config.start.workdir:
            state["params"], description["source"] = starting_params(config, tokenizer, state["params"], mesh)
    else:
        saved = checkpoints.description(start)
        store.check_matches(saved, description, f"{workdir}/{start}")
        description["source"] = saved.get("source", {})
        state = checkpoints.restore(start, trainer.state_shape)
    return Run(workdir, config, tokenizer, trainer, batches, validation_batches, checkpoints, description, start, state)


def open_dataset(config: Config, workdir: str) -> Dataset:
    """The prepared data of the config; the embedded corpus is prepared in the workdir first. Raises: UserError."""
    path = config.data.path
    if path == "embedded":
        if storage.is_url(workdir):
            raise UserError("config.data.path: embedded is prepared in the workdir, which must then be on a disk")
        path = os.path.join(workdir, "data")
        if hosts.is_first() and not os.path.exists(os.path.join(path, "dataset.json")):
            print("preparing the embedded corpus: Python's documentation topics and standard library", flush=True)
            shards.prepare("embedded", "sentencepiece:train:4096", path, validation_fraction=0.02)
        while not os.path.exists(os.path.join(path, "dataset.json")):  # a barrier of JAX would time out sooner
            time.sleep(1)
    return Dataset(path)


def complete(config: Config, dataset: Dataset) -> Config:
    """The config with what data and machine decide filled in. Raises: UserError."""
    vocab_size = config.model.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"config.model.vocab_size: expected at least the {dataset.vocab_size} ids of {dataset.path}, "
            f"found {vocab_size}"
        )
    backend = attention.resolve_backend(config.model.attention, config.model.dtype)
    model = dataclasses.replace(config.model, vocab_size=vocab_size, attention=backend)
    return dataclasses.replace(config, model=model)


class _End(NamedTuple):
    """Where the steps of a run ended. `validation` is that after the last step, None for a run that was stopped."""

    done: int
    state: dict
    validation: dict | None
    stopped: bool


def _train(run: Run, profile: int, stop: StopSignal, at_exit: contextlib.ExitStack) -> int:
    """Trains a run that was opened, and says how it ended. Returns: the exit code."""
    feeder = Feeder(run.batches, run.trainer, run.start)
    validation = Validation(run.validation_batches, run.trainer, stop.now)
    recorder = Recorder(
        run.config, run.workdir, run.start, run.batches, run.checkpoints, run.description, profile_steps=profile
    )
    at_exit.callback(recorder.close)
    recorder.line(summary.opening(run.trainer, run.batches, feeder.sizes[0], run.start))
    end = _steps(run, feeder, recorder, validation, stop)
    recorder.sync()
    run.checkpoints.wait()
    if end.stopped:
        saved = f"{run.workdir}/{end.done}"
        recorder.line(f"stopped by a signal after step {end.done}; saved {saved}; run the same line to go on")
        return STOPPED
    recorder.end_progress()
    summary.finish(run.trainer, end.state["params"], run.tokenizer, end.validation, run.workdir)
    return 0


def _steps(run: Run, feeder: Feeder, recorder: Recorder, validation: Validation, stop: StopSignal) -> _End:
    """Trains, saves and validates from the run's start to its last step or a stop signal."""
    config, state, done, result = run.config, run.state, run.start, None
    if done and _due(done, config.eval.every, config.steps):
        # A signal may have ended the earlier run between this checkpoint and its validation: it is made again.
        result = _validate(validation, recorder, done, state)
    if stop.now():
        return _End(done, state, None, stopped=True)
    recorder.start()
    for step, batch, size in feeder:
        with recorder.dispatching(step, size):
            state, metrics = run.trainer.train(state, batch)
        # Reading a metric waits for its step to end. The metrics of the step before are read only now, when the
        # devices have the next step to work on, so that they never wait for the host.
        recorder.add(step, size, metrics)
        run.checkpoints.check()
        done = step + 1
        stopped = stop.after_step(done)
        saving = stopped or _due(done, config.checkpoint.every, config.steps)
        validating = not stopped and _due(done, config.eval.every, config.steps)
        if saving or validating:
            recorder.read()  # of this step too: a state whose loss is not finite must not be saved
        if saving:
            _save(run, recorder, done, state)
        if validating:
            result = _validate(validation, recorder, done, state)
            stopped = result is None
        if stopped and not saving:
            _save(run, recorder, done, state)
        if stopped:
            return _End(done, state, None, stopped=True)
    return _End(done, state, result, stopped=False)


def _due(done: int, every: int, last: int) -> bool:
    """Whether what is done every `every` steps, and after the last one, is due after `done` steps."""
    return done % every == 0 or done == last


def _save(run: Run, recorder: Recorder, done: int, state: dict) -> None:
    with recorder.paused():
        recorder.sync()  # before the checkpoint, so that a run that goes on from it misses no record
        run.checkpoints.save(done, state, run.description)


def _validate(validation: Validation, recorder: Recorder, done: int, state: dict) -> dict | None:
    """The result, written and printed; None if a signal stopped the validation."""
    with recorder.paused():
        result = validation(state["params"])
        if result is not None:
            recorder.validated(done, result)
    return result
