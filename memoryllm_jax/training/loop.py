"""One training run: opens data, devices and checkpoints, trains, saves and validates, and reports at the end."""

import contextlib
import dataclasses
import os
import time
from typing import NamedTuple

import jax
import msgspec

from memoryllm_jax.checkpoint import branch, run_data
from memoryllm_jax.checkpoint import description as description_lib
from memoryllm_jax.checkpoint.description import Description
from memoryllm_jax.checkpoint.reader import Reader
from memoryllm_jax.checkpoint.store import Checkpoints
from memoryllm_jax.checkpoint.warm_start import starting_params
from memoryllm_jax.common import hosts, progress, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.common.hosts import StoppedEarly, StopSignal
from memoryllm_jax.config import Config
from memoryllm_jax.data import shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.documents import EMBEDDED
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.model import attention, sharding
from memoryllm_jax.training import distillation, during, spikes, summary, tracking
from memoryllm_jax.training.batches import TrainBatches, ValidationBatches, local_shards
from memoryllm_jax.training.compilation import NEED_LESS
from memoryllm_jax.training.during import Observer, OpenTasks, Tasks
from memoryllm_jax.training.feeder import Feeder
from memoryllm_jax.training.goodput import Goodput
from memoryllm_jax.training.recorder import Recorder
from memoryllm_jax.training.step import Trainer
from memoryllm_jax.training.validation import Validation


def train(
    config: Config,
    workdir: str,
    devices: list[jax.Device] | None = None,
    profile: int = 0,
    open_tasks: OpenTasks | None = None,
) -> int:
    """Trains until the last step or a stop signal, from the newest checkpoint in the workdir if there is one.

    Args:
      workdir: folder or gs:// URL for checkpoints and metrics. Only one run at a time may use it.
      devices: devices to train on; None: all.
      profile: number of steps to profile; the trace goes to WORKDIR/profile. 0: none.
      open_tasks: opens the tasks of config.eval; None: such a config is refused.
    Returns: the exit code: 0, or ExitCode.STOPPED after a signal.
    Raises: UserError, if this is the only process of the run. With several processes an error ends this process.
    """
    goodput = Goodput()  # counts from here
    workdir = description_lib.folder(workdir)
    with contextlib.ExitStack() as at_exit:
        unlock = contextlib.ExitStack()
        at_exit.enter_context(unlock)
        try:
            stop = StopSignal()
            at_exit.callback(stop.restore)
            if hosts.is_first() and not storage.is_url(workdir):
                # A start that fails before it writes anything leaves no folder.
                unlock.callback(storage.release_lock, storage.lock_folder(workdir), workdir)
            hosts.wait_for_all("the workdir is locked")  # if it is in use, the others end here and blame nothing else
            if hosts.is_first():
                tracking.check(config.log)
            tasks = opened_tasks(config, open_tasks)
            run = open_run(config, workdir, devices, stop, at_exit)
            if stop.now():  # while the data was verified
                print(_stopped(run, run.start), flush=True)
                return ExitCode.STOPPED
            return _train(run, tasks, goodput, profile, stop, at_exit)
        except (Exception, KeyboardInterrupt, StoppedEarly) as error:
            if jax.process_count() > 1:
                unlock.close()  # one of several processes ends without cleanup
            hosts.fail(error, f"; {NEED_LESS}")


def opened_tasks(config: Config, open_tasks: OpenTasks | None) -> Tasks | None:
    """The tasks that the config names, or None. Raises: UserError, also if nothing opens them."""
    if not config.eval.tasks:
        return None
    if open_tasks is None:
        raise UserError(f"config.eval.tasks: expected none, as nothing here opens tasks, found {config.eval.tasks}")
    return open_tasks(config.eval)


class Run(NamedTuple):
    """An opened run, ready to train from step `start`."""

    workdir: str
    config: Config  # as `complete` returns it
    tokenizer: Tokenizer
    trainer: Trainer
    batches: TrainBatches
    validation_batches: ValidationBatches
    checkpoints: Checkpoints
    description: Description  # saved with each checkpoint
    start: int  # steps done before this process
    state: dict  # the trainer's state after `start` steps


def open_run(
    config: Config,
    workdir: str,
    devices: list[jax.Device] | None,
    stop: StopSignal,
    at_exit: contextlib.ExitStack,
) -> Run:
    """Opens data, devices and checkpoints, and initialises or restores the state.

    Args:
      workdir: absolute path or URL, as `description.folder` returns it.
      devices: devices to train on; None: all.
      stop: ends the verification of the data. The run is opened all the same.
      at_exit: gets what must be closed when the run ends.
    Raises: UserError.
    """
    dataset = open_dataset(config, workdir)
    config = complete(config, dataset)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(config, mesh)
    tokenizer = dataset.tokenizer()
    trainer = Trainer(config, mesh)
    local = local_shards(trainer.batch_sharding, trainer.shards)
    batches = TrainBatches(config, dataset, trainer.shards, local)
    validation_batches = ValidationBatches(config, dataset, trainer.shards, local)
    description = description_lib.describe(config, dataset.digest, tokenizer, shares=dataset.shares)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    at_exit.callback(checkpoints.close)
    beginning = _beginning(trainer, checkpoints, description, tokenizer)
    if config.data.verify:  # last, as it can take long, and what is refused should be refused before
        _verify(dataset, stop)
    state = beginning.state
    if beginning.base_layers is not None:
        text = TrainBatches(distillation.text_config(config), dataset, trainer.shards, local)
        state["params"] = distillation.distil(trainer, text, state["params"], beginning.base_layers, stop.now)
    return Run(
        workdir=workdir,
        config=config,
        tokenizer=tokenizer,
        trainer=trainer,
        batches=batches,
        validation_batches=validation_batches,
        checkpoints=checkpoints,
        description=msgspec.structs.replace(description, source=beginning.source),
        start=beginning.step,
        state=state,
    )


class _Beginning(NamedTuple):
    """Where a run begins: steps done, the state after them, the description's `source`, and `Start.base_layers`."""

    step: int
    state: dict
    source: dict
    base_layers: dict | None = None


def _beginning(
    trainer: Trainer, checkpoints: Checkpoints, description: Description, tokenizer: Tokenizer
) -> _Beginning:
    """The newest checkpoint; or without one, what `config.start` names, or random parameters. Raises: UserError."""
    config, workdir = trainer.config, checkpoints.workdir
    newest = checkpoints.latest()
    if newest == 0:
        # A run saves its first checkpoint after a step; an import is saved as step 0.
        raise UserError(
            f"{workdir}: expected a folder of a training run, found an imported model: "
            f"start from it in another one, with the config configs/start.py:ARCHITECTURE@{workdir}"
        )
    if newest is not None:
        saved = checkpoints.description(newest)
        description_lib.check_matches(saved, description, f"{workdir}/{newest}")
        state = spikes.restore(checkpoints, newest, trainer.state_shape, saved.run())
        return _Beginning(newest, state, saved.source)
    if config.start.optimizer == "continue":
        origin = branch.origin(config, description)
        saved = origin.description
        with contextlib.closing(Reader(origin.workdir)) as reader:
            state = spikes.restore(reader, origin.step, trainer.state_shape, saved.run())
        return _Beginning(origin.step, state, saved.source)
    with hosts.compiling("the initial state", f"; {NEED_LESS}"):
        state = trainer.init(jax.random.key(config.seed))
    if not config.start.workdir:
        return _Beginning(0, state, description.source)
    state["params"], source, base_layers = starting_params(config, tokenizer, state["params"], trainer.mesh)
    return _Beginning(0, state, source, base_layers)


def _verify(dataset: Dataset, stop: StopSignal) -> None:
    """Verifies the data, each host its share, and lets the workdir remember it. Raises: UserError."""
    is_verified = dataset.verify(jax.process_index(), jax.process_count(), hosts.is_first(), stop.now)
    hosts.wait_for_all("the data is verified")  # a host whose share is damaged does not get here, and so no other
    if hosts.is_first() and is_verified:
        dataset.remember_verified()


def open_dataset(config: Config, workdir: str) -> Dataset:
    """Opens the prepared data that the config names. The embedded corpus is prepared in the workdir first.

    Raises: UserError.
    """
    path = run_data.path_of(config, workdir)
    if config.data.path == EMBEDDED:
        if storage.is_url(workdir):
            raise UserError(
                f"config.data.path: embedded is prepared in the workdir: expected a workdir on a disk, found {workdir}"
            )
        if hosts.is_first() and not os.path.exists(os.path.join(path, "dataset.json")):
            print("preparing the embedded corpus: Python's documentation topics and standard library", flush=True)
            shards.prepare(EMBEDDED, "sentencepiece:train:4096", path, validation_fraction=0.02)
        # The other hosts wait for the file, as a barrier of JAX could time out while the first host prepares the data.
        while not os.path.exists(os.path.join(path, "dataset.json")):
            time.sleep(1)
    return Dataset(path, workdir)


def complete(config: Config, dataset: Dataset, accelerator: attention.Accelerator | None = None) -> Config:
    """Fills in what the data decides, model.vocab_size, and what the machine decides, model.attention.

    Args:
      accelerator: to choose model.attention for; None: that of this machine.
    Raises: UserError.
    """
    m = config.model
    vocab_size = m.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"config.model.vocab_size: expected at least the {dataset.vocab_size} ids of {dataset.path}, "
            f"found {vocab_size}"
        )
    backend = attention.resolve_backend(m.attention, m.dtype, m.head_dim, accelerator)
    if config.data.document_mask:
        attention.check_documents(backend, config.seq_len)
    return dataclasses.replace(config, model=dataclasses.replace(m, vocab_size=vocab_size, attention=backend))


class _End(NamedTuple):
    """The end of a run's steps: after the last one, or after a stop signal."""

    done: int
    results: dict[str, dict]  # of the observers after the last step, by kind; empty if the run was stopped
    stopped: bool


def _train(
    run: Run, tasks: Tasks | None, goodput: Goodput, profile: int, stop: StopSignal, at_exit: contextlib.ExitStack
) -> int:
    """Trains an opened run, and reports how it ended. Returns: the exit code."""
    sizes, validation_sizes = run.batches.sizes(), run.validation_batches.sizes()
    if hosts.is_first():
        print(summary.opening(run.trainer, run.batches, sizes, run.start), flush=True)
    validation = Validation(run.config.eval.every, run.validation_batches, run.trainer, validation_sizes, stop.agreed)
    observers = [validation, *during.observers(run.trainer, run.tokenizer, tasks, stop.agreed)]
    if tasks is not None and run.start < run.config.steps:
        with goodput.during("tasks"):
            during.check(observers)
    start = time.monotonic()
    with goodput.during("compile"), hosts.compiling("the training step", f"; {NEED_LESS}"):
        run.trainer.compile(sizes, validation_sizes)
    if hosts.is_first():
        print(f"compiled in {progress.duration(time.monotonic() - start)}", flush=True)
    feeder = Feeder(run.batches, run.trainer, sizes, run.start)
    recorder = Recorder(
        run.config,
        run.workdir,
        start=run.start,
        batches=run.batches,
        checkpoints=run.checkpoints,
        description=run.description,
        sizes=sizes,
        goodput=goodput,
        skipped=spikes.skipped(run.state),
        profile_steps=profile,
    )
    at_exit.callback(recorder.close)
    end = _steps(run, feeder, recorder, observers, stop)
    with recorder.paused("save"):
        recorder.sync()
        run.checkpoints.wait()  # the last one may still be on its way to disk
    times = recorder.finish(end.done)
    if end.stopped:
        recorder.line(summary.times_text(times))
        recorder.line(_stopped(run, end.done))
        return ExitCode.STOPPED
    recorder.end_progress()
    summary.finish(run.config, end.results, times, run.workdir)
    return 0


def _stopped(run: Run, done: int) -> str:
    """The line that says that a signal has stopped the run after `done` steps."""
    saved = f"saved {run.workdir}/{done}" if done else "nothing to save yet"
    return f"stopped by a signal after step {done}; {saved}; run the same line to go on"


def _steps(run: Run, feeder: Feeder, recorder: Recorder, observers: list[Observer], stop: StopSignal) -> _End:
    """Trains, saves and observes from step `run.start` until the last step or a stop signal."""
    done, state = run.start, run.state
    results = {}
    stop.begin()
    if done:
        # A signal or a kill may have ended the earlier run between this checkpoint and what was due after it.
        results = _observe(run, recorder, observers, done, state, again=True)
    if results is None or stop.agreed():
        return _End(done, {}, stopped=True)
    for step, batch, size in recorder.steps(feeder):
        with recorder.dispatching(step, size):
            state, metrics = run.trainer.train(state, batch)
        # Reading a metric waits for its step to end. `add` therefore reads the metrics of the step before: the devices
        # already have this step to work on, and never wait for the host.
        recorder.add(step, size, metrics)
        run.checkpoints.check()
        done = step + 1
        results = _after_step(run, recorder, observers, stop, done, state)
        if results is None:
            return _End(done, {}, stopped=True)
    # All observers are due after the last step. If no step was left, these are the results from before the loop.
    return _End(done, results, stopped=False)


def _after_step(
    run: Run, recorder: Recorder, observers: list[Observer], stop: StopSignal, done: int, state: dict
) -> dict[str, dict] | None:
    """Saves and observes where that is due after `done` steps, and saves before the run stops for a signal.

    Args:
      stop: asked once a step, because with several hosts each answer is an agreement between all of them.
      done: number of steps done.
      state: the trainer's state after these steps.
    Returns: the results of the observers that were due, by kind; None if a signal stopped the run: it is saved then.
    """
    stopped = stop.agreed()
    saving = stopped or _due(done, run.config.checkpoint.every, run.config.steps)
    if saving:
        _save(run, recorder, done, state)
    if stopped:
        return None
    results = _observe(run, recorder, observers, done, state)
    if results is None and not saving:  # a signal stopped an observer; one checkpoint a step is enough
        _save(run, recorder, done, state)
    return results


def _due(done: int, every: int, last: int) -> bool:
    """Whether something is due after `done` steps that is done every `every` steps (0: never) and after the last."""
    return done == last or (every > 0 and done % every == 0)


def _save(run: Run, recorder: Recorder, done: int, state: dict) -> None:
    with recorder.saving(done):
        run.checkpoints.save(done, state, run.description)


def _observe(
    run: Run, recorder: Recorder, observers: list[Observer], done: int, state: dict, again: bool = False
) -> dict[str, dict] | None:
    """Lets the observers that are due after `done` steps look at the state, and records and prints their results.

    Args:
      again: the run resumes here. What an earlier process recorded at this step is not made again.
    Returns: the results by kind; None if a signal stopped an observer.
    """
    results = {}
    for observer in observers:
        if not _due(done, observer.every, run.config.steps):
            continue
        if again and observer.asked:
            kept = recorder.kept(observer)
            if hosts.as_the_first(kept is not None):
                results[observer.kind] = kept or {}  # which the first host alone has, and writes to result.json
                continue
        with recorder.paused(observer.kind):
            result = observer(state["params"])
            if result is None:
                return None
            recorder.observed(done, observer, result)
        results[observer.kind] = result
    return results
