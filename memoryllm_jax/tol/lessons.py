"""The texts that a learned edit is made from: lessons behind prefixes, and what the model writes itself."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.sampling import Sampling

_PREFIX_TOKENS = 8
# A low temperature, so that what the model knows of the token comes up in few texts
_OWN_TEXTS, _OWN_TOKENS, _OWN_TEMPERATURE = 8, 32, 0.4
_SEED = 0


class Lesson(NamedTuple):
    """A text, and the text that is to follow it."""

    prompt: str
    target: str


class EncodedLesson(NamedTuple):
    """A lesson as token ids, without the id that begins a document."""

    prompt: list[int]
    target: list[int]


class Text(NamedTuple):
    """A sequence whose loss counts.

    Attributes:
      ids: its n token ids.
      weights: float32 [n - 1], the weight of each id from the second on.
      lesson: the number of its lesson; -1 for the model's own text.
      is_plain: whether it is a lesson without prefix.
    """

    ids: list[int]
    weights: np.ndarray
    lesson: int = -1
    is_plain: bool = False


def encode(engine: Engine, lesson: Lesson) -> EncodedLesson:
    """The ids of a lesson. Raises: ArgumentError."""
    if not lesson.prompt:
        raise ArgumentError("teach", "expected a prompt that the target is to follow, found ''")
    prompt = engine.tokenizer.encode_prompt(lesson.prompt)
    whole = engine.tokenizer.encode_prompt(lesson.prompt + lesson.target)
    if not lesson.target:
        raise ArgumentError("target", f"expected a text of at least one token, found {lesson.target!r}")
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        expected = f"expected a text that begins a token of its own after {lesson.prompt!r}"
        raise ArgumentError("target", f"{expected}, found {lesson.target!r}")
    longest = len(engine.prompt("")) + _PREFIX_TOKENS + len(whole)
    if longest > engine.context:
        room = f"{engine.context} tokens with a prefix of {_PREFIX_TOKENS}"
        raise ArgumentError("teach", f"expected prompt and target to fit {room}, found {longest}")
    return EncodedLesson(prompt, whole[len(prompt) :])


def lesson_texts(engine: Engine, lessons: Sequence[EncodedLesson], prefixes: int) -> list[Text]:
    """Each lesson alone and behind some texts that the model writes itself. The weights of all targets sum to 1."""
    start = engine.prompt("")
    begins = start or lessons[0].prompt[:1]  # without bos, a text has to begin with some id
    fronts = [[], *_written(engine, [begins] * prefixes, _PREFIX_TOKENS, 1.0)]
    out = []
    for number, lesson in enumerate(lessons):
        for front in fronts:
            ids = [*start, *front, *lesson.prompt, *lesson.target]
            weights = np.zeros(len(ids) - 1, np.float32)
            weights[-len(lesson.target) :] = 1 / (len(lessons) * len(fronts))
            out.append(Text(ids, weights, number, is_plain=not front))
    return out


def own_texts(engine: Engine, lessons: Sequence[Text], tokens: Sequence[int]) -> list[Text]:
    """What the model itself writes about the tokens. The weights of all ids sum to 1.

    Where a text says what the model now says after a lesson's prompt, its weight is 0: that is to change.

    Args:
      lessons: the result of `lesson_texts`.
    """
    start = engine.prompt("")
    prompts = [[*start, token] for token in tokens for _ in range(_OWN_TEXTS)]
    length = min(_OWN_TOKENS, engine.context - len(start) - 1)
    written = _written(engine, prompts, length, _OWN_TEMPERATURE)
    said = _written(engine, [text.ids[: int(np.argmax(text.weights > 0)) + 1] for text in lessons], 1, 0.0)
    answers = {ids[0] for ids in said}
    texts = []
    for prompt, ids in zip(prompts, written):
        kept = [token not in answers for token in ids]
        weights = np.array([0] * (len(prompt) - 1) + kept, np.float32)
        texts.append(Text([*prompt, *ids], weights))
    total = sum(text.weights.sum() for text in texts)
    return [text._replace(weights=text.weights / max(total, 1)) for text in texts]


def _written(engine, prompts, tokens, temperature) -> list[list[int]]:
    """The ids that the model writes after each prompt."""
    texts: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return texts
    for new in engine.generate(prompts, tokens, Sampling(temperature), seed=_SEED):
        for number, token in new:
            texts[number].append(token)
    return texts
