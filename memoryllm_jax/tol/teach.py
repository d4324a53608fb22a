"""Learned edits: the rows of a few tokens, changed by gradient so that a target follows a prompt.

The weights stay as they are, and so do the rows of all other tokens: a text without the tokens is computed from the
same numbers as before. With lessons k = 1..K, each a prompt and its target, and the rows y_t of token t in the chosen
layers, the change d minimises

    L(d) = 1/K sum_k mean_j -log p(target_k | prefix_j + prompt_k; y + d)  +  c mean_s -log p(s | y + d)
    with |d_t| <= R |y_t| for each token t

Prefix 0 is empty and the others are short texts that the model writes itself, so that the change does not depend on
the place of the prompt (as in ROME: Meng et al. 2022, section 3.1). s are texts that the model writes about the tokens
before the edit, without what it said after the prompts. They keep what else it knows of the tokens, as ROME's KL
divergence on "SUBJECT is a" does; their weight c falls from `keep` to 0 over the steps.

Each step goes along the negative gradient, and its length is a fixed share of |y_t|. The steps end as soon as each
target is likely enough after its prompt, alone and on average over the prefixes.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.data.tokenizer import Tokenizer
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol.lessons import EncodedLesson, Lesson, Text, encode, lesson_texts, own_texts
from memoryllm_jax.tol.memory import check_editable

_STEP = 0.02  # length of a step over the norm of a token's rows
_MOST_STEPS = 120
_SEQUENCES = 16  # of one gradient computation, for each batch shard: they decide how much memory it needs


@dataclasses.dataclass(frozen=True)
class Method:
    """How rows are learned."""

    probability: Annotated[float, Option("end when each target has this probability", least=0)] = 0.9
    most_change: Annotated[float, Option("largest change over the norm of a token's rows", least=0)] = 1.0
    keep: Annotated[
        float,
        Option("weight of the model's own texts: more keeps more of what it knows of the token, 0 nothing", least=0),
    ] = 3.0
    prefixes: Annotated[int, Option("texts in front of the prompt", least=0)] = 4

    def __post_init__(self):
        options.check(self)
        if self.probability >= 1:
            raise ArgumentError("probability", f"expected less than 1, found {self.probability:g}")


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What to teach, and how."""

    teach: Annotated[tuple[str, ...], Option("prompt that --target is to follow (needs --workdir)", many=True)] = ()
    target: Annotated[tuple[str, ...], Option("text to follow the prompt of --teach, such as ' Y'", many=True)] = ()
    token: Annotated[
        tuple[str, ...],
        Option("token whose rows --teach changes; by default the rarest of each prompt, judged by its id", many=True),
    ] = ()
    method: Method = Method()

    def __post_init__(self):
        if len(self.teach) != len(self.target):
            expected = f"expected one for each of {len(self.teach)} prompts"
            raise ArgumentError("target", f"{expected}, found {len(self.target)}")
        if self.token and not self.teach:
            raise ArgumentError("token", "expected a prompt to teach on the same line, found none")

    def lessons(self) -> list[Lesson]:
        """The prompts with their targets."""
        return [Lesson(*pair) for pair in zip(self.teach, self.target)]


class Learned(NamedTuple):
    """New rows of n tokens, and what they do to K lessons.

    Attributes:
      rows: float32 [k, D] by token id, the new rows in the k chosen layers.
      change: by token id, the norm of the change over that of the rows.
      before_K, after_K: probability of each target after its prompt.
      steps: number of gradient steps.
    """

    rows: dict[int, np.ndarray]
    change: dict[int, float]
    before_K: np.ndarray
    after_K: np.ndarray
    steps: int


def learn(
    engine: Engine,
    lessons: Sequence[Lesson],
    tokens: Sequence[str] = (),
    layers: Sequence[int] | None = None,
    method: Method | None = None,
) -> Learned:
    """Finds new rows of tokens with which each lesson's target follows its prompt.

    Args:
      engine: a model that adds rows to the residual stream; they may be live, those of a ToL file, or edited.
      lessons: at least one.
      tokens: the tokens whose rows change, each as text or #ID. By default the `rarest_token` of each prompt.
      layers: layers whose rows may change; None for all.
      method: by default `Method()`.
    Raises: UserError, also if a target does not become that likely.
    """
    method = method or Method()
    check_editable(engine.config, engine.trained.workdir)
    encoded = [encode(engine, lesson) for lesson in lessons]
    ids = _tokens(engine, lessons, encoded, tokens)
    texts = lesson_texts(engine, encoded, method.prefixes)
    if method.keep:
        texts += own_texts(engine, texts, ids)
    chosen = sorted(layers) if layers is not None else list(range(engine.config.layers))
    problem = _Problem(engine, texts, ids, chosen)
    change, found, steps = _descend(problem, method)
    for lesson, p, is_likeliest in zip(lessons, np.minimum(found.plain_K, found.reached_K), found.is_likeliest_K):
        if p < method.probability or not is_likeliest:
            raise UserError(
                f"teach: {lesson.prompt!r}: expected {lesson.target!r} with probability {method.probability:g}, "
                f"reached {p:.2g} in {steps} steps with a change of {problem.relative(change).max():.2g} "
                "of the rows' norm: nothing is written"
            )
    rows = dict(zip(ids, problem.rows_nkD + change))
    before = problem.evaluate(np.zeros_like(change), 0)
    return Learned(rows, dict(zip(ids, problem.relative(change).tolist())), before.plain_K, found.plain_K, steps)


def described(engine: Engine, lessons: Sequence[Lesson], learned: Learned) -> str:
    """The edit in words: lessons, tokens, probabilities and the size of the change."""
    said = [
        f"{lesson.prompt!r} -> {lesson.target!r} ({before:.2g} to {after:.2g})"
        for lesson, before, after in zip(lessons, learned.before_K, learned.after_K)
    ]
    changed = [
        f"#{i} {engine.tokenizer.decode([i])!r} by {share:.2f} of its norm" for i, share in learned.change.items()
    ]
    return f"teach {', '.join(said)} with {', '.join(changed)}"


def rarest_token(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """The largest id of those with more than one character, as a guess at the rarest token of a prompt.

    Vocabularies of byte pairs number their merged tokens by frequency. Single characters are frequent, whatever their
    ids: sentencepiece numbers them last.
    """
    return max(ids, key=lambda i: (len(tokenizer.decode([i])) > 1, i))


def _tokens(engine, lessons, encoded: list[EncodedLesson], names) -> list[int]:
    """The ids of the tokens whose rows change. Raises: ArgumentError if they and the prompts do not fit."""
    if not names:
        return sorted({rarest_token(engine.tokenizer, lesson.prompt) for lesson in encoded})
    ids = [engine.tokenizer.token(name, "token", engine.config.vocab_size) for name in names]
    for name, token in zip(names, ids):
        if not any(token in lesson.prompt for lesson in encoded):
            raise ArgumentError("token", f"expected a token of a prompt, found {name!r}, which is in none")
    for lesson, (prompt, _) in zip(lessons, encoded):
        if not set(prompt) & set(ids):
            raise ArgumentError("token", f"expected one of the prompt {lesson.prompt!r}, found none")
    return sorted(set(ids))


class _Found(NamedTuple):
    """What rows do.

    Attributes:
      plain_K: probability of each lesson's target after its prompt.
      reached_K: its mean over the prefixes.
      is_likeliest_K: whether each id of the target is the likeliest after the prompt.
      gradient_nkD: of the loss, with respect to the rows.
    """

    plain_K: np.ndarray
    reached_K: np.ndarray
    is_likeliest_K: np.ndarray
    gradient_nkD: np.ndarray


class _Batch(NamedTuple):
    """Texts of one gradient computation: what `Decoder.row_gradients` takes, and which are the model's own, [B]."""

    texts: list[Text]
    index_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    is_own_B: np.ndarray


class _Problem:
    """The loss as a function of the change.

    Attributes:
      rows_nkD: float32, the rows of the n tokens in the k layers, before the change.
    """

    def __init__(self, engine: Engine, texts: list[Text], ids: list[int], layers: list[int]):
        self._decoder, self._layers = engine.decoder, layers
        of_lessons = [text for text in texts if text.lesson >= 0]
        self._lesson_P = np.array([text.lesson for text in of_lessons])
        self._is_plain_P = np.array([text.is_plain for text in of_lessons])
        every_id = np.unique([token for text in texts for token in text.ids]).astype(np.int32)
        self._batches = _batches(texts, every_id, engine)
        padding = bucket(len(every_id), engine.config.vocab_size) - len(every_id)
        rows = engine.rows.fetch(np.pad(every_id, (0, padding), mode="edge"))
        self._place_n = np.searchsorted(every_id, ids)
        # Float32 sums small changes. A layer that a file dropped is zero, and may become something.
        missing = jnp.zeros(rows.x0_SUD.shape, jnp.float32)
        ffn = [None if y_1UD is None else y_1UD.astype(jnp.float32) for y_1UD in rows.rows_LSUP]
        for layer in layers:
            ffn[layer] = missing if ffn[layer] is None else ffn[layer]
        self._rows = TokenRows(rows.x0_SUD, ffn)
        self.rows_nkD = np.stack([np.asarray(ffn[layer][0, self._place_n]) for layer in layers], 1)
        self._norm_n = _norms(self.rows_nkD)
        if not self._norm_n.all():
            token = ids[int(np.argmin(self._norm_n))]
            raise ArgumentError("token", f"expected rows that are not zero, found those of #{token}")

    def relative(self, x_nkD: np.ndarray) -> np.ndarray:
        """The norm of each token's part over that of its rows, [n]."""
        return _norms(x_nkD) / self._norm_n

    def evaluate(self, change_nkD: np.ndarray, keep: float) -> _Found:
        """What the rows with this change do. Args: keep: the weight of the model's own texts."""
        rows, gradient_nkD = self._changed(change_nkD), np.zeros_like(change_nkD)
        p, are_likeliest = [], []  # of the target of each text that belongs to a lesson
        for texts, index_BT, targets_BT, weights_BT, is_own_B in self._batches:
            weighted_BT = weights_BT * np.where(is_own_B, keep, 1).astype(np.float32)[:, None]
            found = self._decoder.row_gradients(rows, index_BT, targets_BT, weighted_BT, self._layers)
            gradient_nkD += np.stack([np.asarray(found.by_layer[k])[self._place_n] for k in self._layers], 1)
            scores = zip(texts, np.asarray(found.scores.log_probs), np.asarray(found.scores.is_likeliest))
            for text, log_probs_T, likeliest_T in scores:
                if text.lesson >= 0:
                    is_target_T = np.pad(text.weights > 0, (0, len(log_probs_T) - len(text.weights)))
                    p.append(np.exp(log_probs_T[is_target_T].sum()))
                    are_likeliest.append(likeliest_T[is_target_T].all())
        mean_K = np.bincount(self._lesson_P, p) / np.bincount(self._lesson_P)
        is_plain_P = self._is_plain_P
        return _Found(np.array(p)[is_plain_P], mean_K, np.array(are_likeliest)[is_plain_P], gradient_nkD)

    def _changed(self, change_nkD) -> TokenRows:
        ffn = list(self._rows.rows_LSUP)
        with jax.set_mesh(self._decoder.mesh):
            for number, layer in enumerate(self._layers):
                row_nD = self.rows_nkD[:, number] + change_nkD[:, number]
                ffn[layer] = _replaced(ffn[layer], self._place_n, row_nD)
        return self._rows._replace(rows_LSUP=ffn)


def _descend(problem: _Problem, method: Method) -> tuple[np.ndarray, _Found, int]:
    """Takes steps until each target is likely enough, or no more are allowed. Returns: (change, its result, steps)."""
    change_nkD = np.zeros_like(problem.rows_nkD)
    progress = Progress("teach", _MOST_STEPS, "step", stream=sys.stderr, quiet_s=5)
    for step in range(_MOST_STEPS + 1):
        # Where the two kinds of texts want different rows, the target comes first in the end.
        found = problem.evaluate(change_nkD, method.keep * (1 - step / _MOST_STEPS))
        least = np.minimum(found.plain_K, found.reached_K).min()
        if (least >= method.probability and found.is_likeliest_K.all()) or step == _MOST_STEPS:
            break
        progress.update(step, f"least probability {least:.2g}")
        # A step has the same length for each token, whatever its gradient's: far from the target gradients vanish.
        length_n = problem.relative(found.gradient_nkD)
        change_nkD -= _STEP * found.gradient_nkD / np.maximum(length_n, 1e-30)[:, None, None]
        change_nkD *= np.minimum(1, method.most_change / np.maximum(problem.relative(change_nkD), 1e-30))[:, None, None]
    progress.close()
    return change_nkD, found, step


def _norms(x_nkD):
    return np.sqrt(np.square(x_nkD).sum((1, 2)))


@jax.jit
def _replaced(y_1UD, place_n, row_nD):
    return y_1UD.at[0, place_n].set(row_nD)


def _batches(texts: list[Text], every_id: np.ndarray, engine: Engine) -> list[_Batch]:
    """The texts in batches of one shape, padded on the right and with sequences that have no weight."""
    shards = engine.decoder.shards
    B = shards * min(_SEQUENCES, -(-len(texts) // shards))
    T = bucket(max(len(text.ids) for text in texts) - 1, engine.context)
    out = []
    for start in range(0, len(texts), B):
        chosen = texts[start : start + B]
        inputs_BT = np.full((B, T), every_id[0], np.int32)
        targets_BT, weights_BT = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
        for b, text in enumerate(chosen):
            end = len(text.ids) - 1
            inputs_BT[b, :end], targets_BT[b, :end], weights_BT[b, :end] = text.ids[:-1], text.ids[1:], text.weights
        index_BT = np.searchsorted(every_id, inputs_BT).astype(np.int32)
        is_own_B = np.array([text.lesson < 0 for text in chosen] + [False] * (B - len(chosen)))
        out.append(_Batch(chosen, index_BT, targets_BT, weights_BT, is_own_B))
    return out
