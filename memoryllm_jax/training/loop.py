"""One training run, from its newest checkpoint or the start, to its end."""

import contextlib
import dataclasses
import math
import os
import signal
import time

import jax
from jax.experimental import multihost_utils

from memoryllm_jax.checkpoint import store
from memoryllm_jax.checkpoint.trained import for_serving
from memoryllm_jax.checkpoint.warm_start import starting_params
from memoryllm_jax.common import hosts, storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.hosts import STOPPED
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.config import Config
from memoryllm_jax.data import dataset, shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling, generate
from memoryllm_jax.model import attention, flops, sharding
from memoryllm_jax.model.loss import quality
from memoryllm_jax.training import metrics
from memoryllm_jax.training.batches import (
    SizeAgreement,
    TrainBatches,
    ValidationBatches,
    is_vocabulary,
    local_shards,
    place,
)
from memoryllm_jax.training.step import Trainer


def train(config: Config, workdir: str, devices: list[jax.Device] | None = None, profile: int = 0) -> int:
    """One run on all devices or those given, from its newest checkpoint or the start, to its end.

    Args:
      profile: steps to leave a trace of in the workdir.
    Returns the exit code. Raises: UserError.
    """
    first_host = jax.process_index() == 0
    workdir = store.folder(workdir)
    lock = storage.lock_folder(workdir) if first_host and not storage.is_url(workdir) else None
    stop = StopSignal()
    with contextlib.ExitStack() as at_exit:
        at_exit.callback(stop.restore)
        if lock is not None:
            at_exit.callback(lock.close)
        try:
            return _train(config, workdir, devices, profile, stop, first_host, at_exit)
        except Exception as error:
            if hosts.is_out_of_memory(error):
                error = UserError(
                    f"out of memory: {' '.join(str(error).split())[:300]}; a larger config.accumulate or "
                    "config.model.remat=full needs less, more devices too; --dry_run tells how much"
                )
            if jax.process_count() == 1:
                raise error
            hosts.abandon(error)


def _train(config: Config, workdir: str, devices, profile, stop: "StopSignal", first_host: bool, at_exit) -> int:
    dataset = open_dataset(config, workdir, first_host)
    config = complete(config, dataset)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_mesh(config, mesh)
    tokenizer = dataset.tokenizer()
    if config.data.verify:
        dataset.verify(jax.process_index(), jax.process_count())

    trainer = Trainer(config, mesh)
    shards = trainer.shards
    local = local_shards(trainer.batch_sharding, shards)
    train_batches = TrainBatches(config, dataset, shards, local)
    validation = ValidationBatches(config, dataset, shards, local)
    sizes = train_batches.sizes()
    description = store.describe(config, dataset, tokenizer)
    checkpoints = store.Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    at_exit.callback(checkpoints.close)
    newest = checkpoints.latest()
    if newest == 0:
        raise UserError(
            f"{workdir}: expected a folder of a training run, found an imported model: "
            f"start from it in another one, with --config=configs/start.py:ARCHITECTURE@{workdir}"
        )
    start = newest or 0
    if start:
        before = checkpoints.description(start)
        store.check_matches(before, description, f"{workdir}/{start}")
        description["source"] = before.get("source", {})
        state = checkpoints.restore(start, trainer.state_shape)
    else:
        state = trainer.init(jax.random.key(config.seed))
        if config.start.workdir:
            state["params"], description["source"] = starting_params(config, tokenizer, state["params"], mesh)
    writer = metrics.Writer(config, description, workdir, start, first_host)
    at_exit.callback(writer.close)
    progress = Progress("train", config.steps, "step", initial=start, enabled=first_host)
    at_exit.callback(progress.close)
    progress.line(summary(config, mesh, train_batches, sizes, start))

    tokens_a_step = config.batch_size * config.seq_len
    bytes_a_token = dataset.train.bytes / dataset.train.tokens
    peak = metrics.peak_flops(config)
    agreement, validation_agreement = (SizeAgreement(s, mesh) for s in (sizes, validation.sizes()))
    clock = Clock()
    trace = metrics.Trace(workdir, profile, progress.line)
    at_exit.callback(trace.close)
    compiled = set()
    since_log = {"steps": 0, "rows": 0}

    def rows_of(size):
        """Rows of token memory that a step evaluates; at the vocabulary's size all shards share one set."""
        return size if is_vocabulary(size, config.model) else size * shards

    def report(step, size, values):
        """Reads a step's metrics, which waits for it: called when the next step is on its way."""
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        since_log["steps"] += 1
        since_log["rows"] += rows_of(size)
        loss = values.pop("loss")
        if not math.isfinite(loss + values["grad_norm"]):
            low, high = step * config.batch_size, (step + 1) * config.batch_size - 1
            raise UserError(
                f"step {step + 1}: the loss is {loss} and the gradient norm {values['grad_norm']}, on sequences {low} "
                f"to {high} of the shuffled data (epoch {train_batches.epoch(step):.3f}); {checkpoints.last_good()}"
            )
        if (step + 1) % config.log.every == 0 or step + 1 == config.steps:
            done = since_log["steps"] * tokens_a_step
            record = {
                **quality(loss, 1, bytes_a_token),
                **values,
                "tokens": (step + 1) * tokens_a_step,
                "epoch": train_batches.epoch(step + 1),
                "rows": rows_of(size),
                **metrics.speed(config, peak, done, since_log["rows"], clock.lap()),
            }
            since_log.update(steps=0, rows=0)
            writer.write(step + 1, "train", record)
            progress.line(f"{train_line(step + 1, config, record)}  ETA {progress.eta()}")
        progress.update(step + 1, f"loss {loss:.3f}")

    def evaluate(step):
        """Loss on the held-out split, or None if a signal came."""
        nll = weight = 0.0
        for i in range(len(validation)):
            if stop.requested(None):
                return None
            batch = validation[i]
            size = validation_agreement.size(validation_agreement.propose(batch.distinct))
            placed = place(batch, size, trainer.batch_sharding, config.model)
            sums = jax.device_get(trainer.evaluate(state["params"], placed))
            nll, weight = nll + float(sums[0]), weight + float(sums[1])
        held_out = dataset.validation
        result = quality(nll / weight, held_out.tokens - 1, held_out.bytes) | {"tokens": int(weight)}
        writer.write(step, "validation", result)
        progress.line(f"step {step}: validation {quality_text(result)}, {int(weight):,} tokens")
        return result

    batches = train_batches.iterate(start)
    upcoming = next(batches) if start < config.steps else None
    proposal = agreement.propose(upcoming.distinct) if upcoming else None
    unread = None
    saved = done = start
    # A signal may have come between the checkpoint and its evaluation, so that is made again.
    result = evaluate(start) if start and (start % config.eval.every == 0 or start == config.steps) else None
    stopped = stop.requested(None)
    clock.lap()
    for step in range(start, start if stopped else config.steps):
        batch, size = upcoming, agreement.size(proposal)
        if step + 1 < config.steps:
            upcoming = next(batches)
            proposal = agreement.propose(upcoming.distinct)
        trace.step(step, step - start)
        placed = place(batch, size, trainer.batch_sharding, config.model)
        with clock.paused(size not in compiled), jax.profiler.StepTraceAnnotation("train", step_num=step):
            compiled.add(size)
            state, values = trainer.train(state, placed)
        if unread:
            report(*unread)
        unread = (step, size, values)
        done = step + 1
        checkpoints.check()
        stopped = stop.requested(done)
        save = done % config.checkpoint.every == 0 or done == config.steps or stopped
        look = (done % config.eval.every == 0 or done == config.steps) and not stopped
        if save or look:
            report(*unread)
            unread = None
            with clock.paused():
                if save:
                    writer.sync()
                    checkpoints.save(done, state, description)
                    saved = done
                result = evaluate(done) if look else None
                stopped = stopped or (look and result is None)
        if stopped:
            if saved != done:
                writer.sync()
                checkpoints.save(done, state, description)
            break
    writer.sync()
    checkpoints.wait()
    if stopped:
        progress.line(f"stopped by a signal after step {done}; saved {workdir}/{done}; run the same line to go on")
        return STOPPED
    progress.close()
    finish(trainer, state, tokenizer, config, result, workdir, first_host)
    return 0


def finish(trainer, state, tokenizer, config, result, workdir, first_host):
    """Prints and writes what the run came to."""
    if first_host:
        record = {"steps": config.steps, "architecture": config.model.architecture, "validation": result}
        storage.write_json(os.path.join(workdir, "result.json"), record)
        print(f"\nvalidation: {quality_text(result)}", flush=True)
    if config.sample.tokens:
        text = sample(trainer, state["params"], tokenizer, config)
        if first_host:
            print(f"sample at temperature {config.sample.temperature:g}:\n{text}")


def sample(trainer, params, tokenizer, config) -> str:
    """The config's prompt and the text that the model goes on with."""
    s, m = config.sample, config.model
    prompt = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(s.prompt)
    prompt = (prompt or [0])[: config.seq_len - 1]
    params = for_serving(params, m)
    decoder, rows = Decoder(m, params, trainer.mesh), LiveRows(m, params, trainer.mesh)
    sizes = (config.seq_len, tokenizer.vocab_size)
    steps = generate(
        decoder, rows, [prompt], s.tokens, Sampling(s.temperature), config.seed % 2**32, *sizes, tokenizer.stop_ids
    )
    return tokenizer.decode(prompt + [token for new in steps for _, token in new])


def open_dataset(config: Config, workdir: str, first_host: bool) -> dataset.Dataset:
    """The prepared data of the config; the embedded corpus is prepared in the workdir first."""
    path = config.data.path
    if path == "embedded":
        if storage.is_url(workdir):
            raise UserError("config.data.path: embedded is prepared in the workdir, which must then be on a disk")
        path = os.path.join(workdir, "data")
        if first_host and not os.path.exists(os.path.join(path, "dataset.json")):
            print("preparing the embedded corpus: Python's documentation topics and standard library", flush=True)
            shards.prepare("embedded", "sentencepiece:train:4096", path, validation_fraction=0.02)
        while not os.path.exists(os.path.join(path, "dataset.json")):  # a barrier would give up sooner
            time.sleep(1)
    return dataset.Dataset(path)


def complete(config: Config, dataset: Dataset) -> Config:
    """The config with what data and machine decide filled in. Raises: UserError."""
    vocab_size = config.model.vocab_size or dataset.vocab_size
    if vocab_size < dataset.vocab_size:
        raise UserError(
            f"config.model.vocab_size: expected at least the {dataset.vocab_size} ids of {dataset.path}, "
            f"found {vocab_size}"
        )
    backend = attention.resolve_backend(config.model.attention, config.model.dtype)
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=vocab_size, attention=backend)
    )


def summary(config, mesh, batches, sizes, start) -> str:
    n = flops.parameters(config)
    shape = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"{config.model.architecture}: {n['total'] / 1e6:.1f}M parameters: {n['active'] / 1e6:.1f}M active, "
        f"{n['memory'] / 1e6:.1f}M in the token memory, {n['embedding_and_head'] / 1e6:.1f}M in embedding and head",
        f"{jax.device_count()} x {jax.devices()[0].device_kind} as {shape}; attention {config.model.attention}, "
        f"{config.model.dtype}",
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} tokens, "
        f"{batches.epoch(config.steps):.2f} epochs; distinct ids a shard padded to {sizes[0]}",
    ]
    return "\n".join(lines + ([f"going on from step {start}"] if start else []))


def quality_text(result: dict) -> str:
    return (
        f"loss {result['loss']:.4f} nats a token, perplexity {result['perplexity']:.2f}, "
        f"{result['bits_per_byte']:.4f} bits per byte"
    )


def train_line(step: int, config: Config, record: dict) -> str:
    mfu = f"  MFU {100 * record['mfu']:.1f}% (plain {100 * record['mfu_plain']:.1f}%)" if "mfu" in record else ""
    return (
        f"step {step}/{config.steps}  loss {record['loss']:.4f}  bits/byte {record['bits_per_byte']:.3f}  "
        f"lr {record['learning_rate']:.2e}  grad {record['grad_norm']:.2f}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['model_flops_per_second'] / 1e9:,.0f} GFLOP/s{mfu}"
    )


class Clock:
    """Seconds of training between laps, without compilation, evaluation and saving."""

    def __init__(self):
        self._start, self._paused = time.monotonic(), 0.0

    def lap(self) -> float:
        now = time.monotonic()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-9)

    @contextlib.contextmanager
    def paused(self, condition=True):
        start = time.monotonic()
        yield
        self._paused += (time.monotonic() - start) * condition


class StopSignal:
    """Notices SIGTERM and SIGINT. On several hosts JAX itself does, SIGTERM only, for all at the same step."""

    def __init__(self):
        self._seen, self._before = False, {}
        self._several = jax.process_count() > 1
        if not self._several:
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        if self._seen and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self._seen = True

    def requested(self, step: int | None) -> bool:
        """After `step`, or between steps (None), where several hosts do not agree and go on."""
        if not self._several:
            return self._seen
        return step is not None and multihost_utils.reached_preemption_sync_point(step)

    def restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
