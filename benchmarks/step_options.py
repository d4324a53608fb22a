"""What an option of the train step costs: memory and time of the step with it and without.

    python benchmarks/step_options.py --option=skipping --output=benchmarks/results/NAME.json

skipping: a step that may be skipped (config.optimizer.max_skipped). norms: norms by layer (config.log.norms_every).

Memory is that of the step compiled ahead of time for --chip, without such a device; its compiler (the extra cuda or
tpu) must be installed. Time is that of steps on this machine's device, on random tokens: both steps in one process, in
turns. One round is --steps steps of each, and the ratio is taken within a round. The time of the processors, on a CPU,
tells more than the clock where other programs run.
"""

import functools
from typing import Annotated

import common
import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.config_files import load
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import resolve
from memoryllm_jax.model import sharding
from memoryllm_jax.training import chips, compilation, plan
from memoryllm_jax.training.batches import abstract_batch
from memoryllm_jax.training.step import Trainer

OPTIONS = {
    "skipping": {"optimizer.max_skipped": 10, "optimizer.spike_deviations": 6.0},
    "norms": {"log.norms_every": 10},
}


def planned(path: str, chip: str, count: int, overrides: dict) -> int:
    """Bytes that one device needs for the step of a config, compiled for devices that need not exist."""
    c = load(path)
    c.update_from_flattened_dict({"model.vocab_size": plan.VOCABULARY, "model.attention": "cudnn"} | overrides)
    config = resolve(c)
    devices, compiler = chips.devices(chip, count)
    mesh = sharding.make_mesh(config.mesh, devices)
    compiled = plan.LoweredStep(config, mesh).compile()
    print(f"{path} on {count} x {chip}: {compiled.memory['total']:,} bytes, by {compiler}", flush=True)
    return compiled.memory["total"]


class Side:
    """A trained model, and the compiled step that trains it on the same random batch again and again."""

    def __init__(self, path: str, overrides: dict):
        c = load(path)
        c.update_from_flattened_dict({"model.vocab_size": 4096, "model.attention": "blocked"} | overrides)
        config = resolve(c)
        trainer = Trainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        size = min(config.batch_size * config.seq_len, config.model.vocab_size)
        shapes = abstract_batch(config, 1, trainer.batch_sharding, size)
        rng = np.random.default_rng(0)
        self._batch = jax.tree.map(lambda x: jnp.asarray(rng.integers(0, size, x.shape), x.dtype), shapes)
        self._batch = self._batch._replace(weights_SAN=jnp.ones_like(self._batch.weights_SAN))
        self._step = trainer.train.lower(trainer.state_shape, shapes).compile()
        self._state = trainer.init(jax.random.key(0))
        self.bytes = compilation.memory_needed(self._step)

    def train(self, count: int) -> None:
        """Makes so many steps, and waits for them."""
        for _ in range(count):
            self._state, values = self._step(self._state, self._batch)
        jax.block_until_ready(values)


def main(
    option: Annotated[str, Option("what the step is measured with and without", choices=tuple(OPTIONS))] = "skipping",
    config: Annotated[str, Option("config whose steps are timed on this machine")] = "configs/tiny.py:flex-3",
    plans: Annotated[tuple[str, ...], Option("configs whose memory is planned; none: no plans")] = (
        "configs/1b.py:flex-3",
    ),
    chip: Annotated[str, Option("kind of device that is planned for", choices=tuple(chips.CHIPS))] = "h100",
    devices: Annotated[int, Option("devices that are planned for", least=1)] = 8,
    steps: Annotated[int, Option("steps of each side in a round", least=1)] = 5,
    rounds: Annotated[int, Option("rounds", least=1)] = 12,
    output: Annotated[str, Option("JSON file for the record", writes=True)] = "",
) -> None:
    sides = {"without": {}, "with": OPTIONS[option]}
    results = {"memory": {}}
    if plans:
        chips.emulate(devices)
    for path in plans:
        found = {
            side: planned(path, chip, devices, overrides | {"batch_size": 16 * devices})
            for side, overrides in sides.items()
        }
        results["memory"][f"{path} on {devices} x {chip}"] = found
    steppers = {name: Side(config, overrides) for name, overrides in sides.items()}
    for side in steppers.values():
        side.train(2)
    times = {name: [] for name in steppers}
    for number in range(rounds):
        # The first of a round may profit from what the one before left behind, so they take turns at it.
        for name in list(steppers)[:: 1 if number % 2 else -1]:
            times[name].append(common.seconds(functools.partial(steppers[name].train, steps), steps))
    results["time"] = {
        "device": jax.devices()[0].device_kind,
        "config": config,
        "bytes": {name: side.bytes for name, side in steppers.items()},
    }
    for kind in ("seconds", "processor_seconds"):
        measured = {name: [each[kind] for each in of_side] for name, of_side in times.items()}
        results["time"][kind] = {
            **{name: common.spread(values) for name, values in measured.items()},
            "with_over_without": common.ratio(measured["with"], measured["without"]),
        }
    print(results)
    common.write(output, results, {})


if __name__ == "__main__":
    cli.run(main)
