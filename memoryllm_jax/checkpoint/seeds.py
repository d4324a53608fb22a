"""Which trained models are seeds of one: runs that differ in config.seed alone."""

from collections.abc import Sequence

from memoryllm_jax.checkpoint import description
from memoryllm_jax.common.errors import ArgumentError


def by_seed(workdirs: Sequence[str], step: int | None = None) -> list[list[str]]:
    """Groups workdirs by seed, so that each group has one run of every model, in the same order of the models.

    Two runs are of one model if they differ in the seed alone, apart from fields that may change on resume. A copy of a
    run, with the same seed too, is a model of its own.

    Args:
      step: checkpoint to read; None: the newest.
    Returns: [the workdirs of the first seed of each model, those of the second, ...].
    Raises: UserError if the models do not have as many seeds each, or those of one are at different steps.
    """
    models: list[list[tuple[str, int, description.Description]]] = []
    for name in workdirs:
        folder = description.folder(name)
        at = description.choose_step(folder, step)
        found = description.read(folder, at)
        for of_model in models:
            if all(_is_other_seed(found, saved) for _, _, saved in of_model):
                of_model.append((name, at, found))
                break
        else:
            models.append([(name, at, found)])
    for (first, at, _), *others in models:
        for name, other, _ in others:
            if other != at:
                found = f"step {at} in {first} and step {other} in {name}"
                raise ArgumentError("workdir", f"expected seeds of one model at one step, found {found}")
    if len({len(of_model) for of_model in models}) > 1:
        found = ", ".join(f"{len(of_model)} of the model in {of_model[0][0]}" for of_model in models)
        raise ArgumentError("workdir", f"expected as many seeds of each model, found {found}")
    return [[name for name, _, _ in of_seed] for of_seed in zip(*models)]


def _is_other_seed(one: description.Description, other: description.Description) -> bool:
    is_same_model = not description.differences(one, other, but=("seed",))
    return is_same_model and one.run().seed != other.run().seed
