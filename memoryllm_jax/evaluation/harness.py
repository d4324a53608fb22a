"""Adapter of trained models to EleutherAI's lm-evaluation-harness (lm_eval), and runs of its tasks.

Texts are tokenized and truncated as in the harness's own adapter for Hugging Face models (HFLM), so that both give the
same numbers for the same model. As with HFLM, bos comes before a text if the tokenizer has one.
"""

import difflib
import functools
import glob
import itertools
import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import lm_eval
import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from memoryllm_jax.common import hosts, storage
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.evaluation.scores import Score
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.generation import STEPS_PER_CALL
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import Streamer

# The harness compiles the templates of a task again for each example, which takes longer than all else that it does.
utils.env.from_string = functools.lru_cache(1 << 10)(utils.env.from_string)

_CACHED_POSITIONS = 1 << 14  # positions of the key-value cache on each batch shard while texts are generated
_SEED = 1234  # the harness's own
_GENERATION_SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")


class _Generation(NamedTuple):
    """How a task wants its texts generated: each ends at the first stop string, or after `max_new` tokens."""

    sampling: Sampling
    stops: list[str]
    max_new: int


class MemoryLLM(TemplateLM):
    """Gives an `Engine` the harness's model interface. Raises: UserError for requests that the model cannot serve.

    Args:
      report: called between batches with the share of the requests that is done. An exception of it ends the work.
    """

    max_gen_toks = 256  # new tokens if the task sets no limit, as in HFLM

    def __init__(self, model: Engine, report: Callable[[float], None] | None = None):
        super().__init__()
        self._report = report
        self._model, self._tokenizer, self.max_length = model, model.tokenizer, model.context

    @property
    def eot_token_id(self) -> int | None:
        """The id that ends a text: eos."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id before a text that has no context: bos, or eos where there is no bos. Raises: UserError."""
        for token in (self._tokenizer.bos_id, self._tokenizer.eos_id):
            if token is not None:
                return token
        raise UserError("texts without context: expected a tokenizer with bos or eos, found one with neither")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text; text that spells a special token becomes that token.

        Args:
          add_special_tokens: False leaves bos out.
        """
        ids = self._tokenizer.encode_special(string)
        if add_special_tokens is False or self._tokenizer.bos_id is None:
            return ids
        return [self._tokenizer.bos_id, *ids]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """Scores continuations of contexts.

        Args:
          requests: (texts, ids of the context, ids of the continuation) of each; texts are the pair of strings, by
            which the harness caches the answer, or None.
        Returns: for each request, the sum of the continuation's log-probabilities in nats, and whether greedy decoding
          gives exactly this continuation.
        """
        sequences = [self._sequence(*request) for request in requests]
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        truncated = [length for length in lengths if length > self.max_length + 1]
        if truncated and hosts.is_first():
            print(f"{len(truncated)} requests are longer than the context of {self.max_length} and lose their start")
        progress = self._progress("score", sum(len(sequence) - 1 for sequence in sequences), "token")
        found = scoring.score(self._model.decoder, self._model.rows, sequences, self.max_length, progress)
        progress.close()
        answers = []
        for (texts, _, continuation), scores in zip(requests, found):
            of_continuation = slice(-len(continuation), None)
            total = scores.log_probs_T[of_continuation].sum(dtype=float)
            answers.append((float(total), bool(scores.greedy_T[of_continuation].all())))
            if texts is not None:  # windows of a rolling request are not cached one by one
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _progress(self, label, total, unit):
        return Progress(label, total, unit, enabled=hosts.is_first(), report=self._report)

    def _sequence(self, texts, context, continuation):
        """Ids of context and continuation, truncated from the left to one more than the model's context.

        One more, because the last id is predicted and never read by the model. Raises: UserError.
        """
        if not context or not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a request: expected a context and a continuation of 1 to {self.max_length} tokens, found "
                f"{len(context)} and {len(continuation)} tokens of {texts and texts[1][:80]!r}"
            )
        return (context + continuation)[-(self.max_length + 1) :]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text, scored in windows of the model's context."""
        windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in rolling])
        # The windows of all texts are scored together, so that they share batches.
        scores = iter(self._loglikelihood_tokens(list(itertools.chain(*windows))))
        totals = [sum(score for score, _ in itertools.islice(scores, len(of_text))) for of_text in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The text that the model generates after each context, up to the first stop string."""
        groups: dict[str, list[int]] = {}  # numbers of the requests that share generation settings, and so batches
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts, seeds = [""] * len(requests), itertools.count()
        progress = self._progress("generate", len(requests), "text")
        for members in groups.values():
            how = self._generation(normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks))
            prompts = {k: self._prompt(requests[k].args[0], how.max_new) for k in members}
            # The longest prompts come first, so that a run that is short of memory fails at once.
            members.sort(key=lambda k: len(prompts[k]), reverse=True)
            capacity = bucket(len(prompts[members[0]]) + how.max_new, self.max_length)
            size = self._model.decoder.shards * max(1, _CACHED_POSITIONS // capacity)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                for k, text in zip(batch, self._texts([prompts[k] for k in batch], how, next(seeds))):
                    texts[k] = text
                    self.cache_hook.add_partial("generate_until", requests[k].args, text)
                progress.update(progress.done + len(batch))
        progress.close()
        return texts

    def _prompt(self, text, max_new):
        """Ids of a text, truncated from the left so that `max_new` tokens still fit the context."""
        ids = self.tok_encode(text) or [self.prefix_token_id]
        return ids[max_new - self.max_length :]

    def _generation(self, settings) -> _Generation:
        """Reads a task's generation_kwargs, after `normalize_gen_kwargs`. Raises: UserError."""
        for name, value in settings.items():
            # An unknown setting is accepted if its value asks for what is done anyway, such as num_beams=1.
            if name not in _GENERATION_SETTINGS and value not in (None, False, 0, 1):
                expected = ", ".join(_GENERATION_SETTINGS)
                raise UserError(f"generation_kwargs: expected {expected}, found {name}={value}")
        max_new = settings["max_gen_toks"]
        if not 0 < max_new < self.max_length:
            raise UserError(
                f"generation_kwargs: expected max_gen_toks from 1 to {self.max_length - 1}, as the model's context is "
                f"{self.max_length}, found {max_new}"
            )
        temperature = settings.get("temperature", 1.0) if settings["do_sample"] else 0.0
        sampling = Sampling(float(temperature), settings.get("top_k") or 0, settings.get("top_p") or 1.0)
        stops = [stop for stop in handle_stop_sequences(settings["until"], None) if stop]
        return _Generation(sampling, stops, max_new)

    def _texts(self, prompts, how: _Generation, seed: int):
        """Generates after each prompt. Returns: the new texts, cut before their first stop strings."""
        stop_ids = set(self._tokenizer.stop_ids)
        ids = [[] for _ in prompts]
        texts = [""] * len(prompts)
        streams = [Streamer(self._tokenizer, []) for _ in prompts]
        running = set(range(len(prompts)))
        for step in self._model.generate(prompts, how.max_new, how.sampling, seed, stop_ids, STEPS_PER_CALL):
            running &= {k for k, _ in step}  # a sequence that has reached a stop id is missing from the step
            for k, token in step:
                if k in running:
                    ids[k].append(token)
                    texts[k] += streams[k].add(token)
            # The engine knows no stop strings and goes on with such a sequence: its later tokens are ignored here.
            running -= {k for k in running if any(stop in texts[k] for stop in how.stops)}
            if not running:
                break
        return [postprocess_generated_text(self._tokenizer.decode(new), how.stops, None) for new in ids]


class _Checks(MemoryLLM):
    """Refuses the requests that `MemoryLLM` refuses. To the others it makes up answers, so that nothing is computed."""

    def _loglikelihood_tokens(self, requests, **_):
        for request in requests:
            self._sequence(*request)
        return [(-float(len(continuation)), False) for *_, continuation in requests]

    def generate_until(self, requests, disable_tqdm: bool = False):
        for request in requests:
            self._generation(normalize_gen_kwargs(request.args[1], self.max_gen_toks))
        return [""] * len(requests)


class Tasks:
    """Tasks by name, found among the harness's own, those in tasks/ beside this file, and those of a folder.

    Args:
      names: names of tasks, groups or tags; * stands for any characters.
      path: folder with task files, or "".
      data: folder with the data of the tasks in tasks/, or "".
    Raises: UserError for an unknown name.
    """

    def __init__(self, names: Sequence[str], path: str = "", data: str = ""):
        if path and not os.path.isdir(path):
            raise ArgumentError("task_path", f"expected a folder with task files, found none at {path}")
        here = os.path.join(os.path.dirname(__file__), "tasks")
        shipped = {os.path.basename(file).removesuffix(".yaml") for file in glob.glob(f"{here}/*.yaml")}
        self._manager = TaskManager(
            include_path=[here, path] if path else [here],
            # The harness's own tasks are listed only if one may be wanted, as that takes ten seconds.
            include_defaults=not shipped.issuperset(names),
            metadata={"task_data": data} if data else None,
        )
        self._names: list[str] = []
        for name in names:
            found = self._manager.match_tasks([name])
            if not found:
                close = difflib.get_close_matches(name, self._manager.all_tasks, 3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise ArgumentError("tasks", f"expected names of tasks, found {name!r}{hint}")
            self._names += found

    def scores(self, model: Engine, num_fewshot: int | None = None, limit: float = 0) -> dict[str, Score]:
        """Scores tasks by one metric each: accuracy ("acc") if the task has it, else its first one.

        Args:
          num_fewshot, limit: as for `run`.
        Returns: {"TASK": accuracy, "TASK METRIC": where a task has no accuracy}. Raises: UserError.
        """
        results = self._evaluate(model, num_fewshot, limit, bootstrap_iters=0, log_samples=True)
        scores = {}
        for task, higher_is_better in results["higher_is_better"].items():
            # The harness names a value METRIC,FILTER.
            values = {key.partition(",")[0]: value for key, value in results["results"][task].items()}
            metrics = [metric for metric in ("acc", *higher_is_better) if metric in values]
            if metrics:  # a group of tasks may have no score of its own
                name = task if metrics[0] == "acc" else f"{task} {metrics[0]}"
                scores[name] = _score(values[metrics[0]], results["samples"].get(task, []), metrics[0])
        return scores

    def load(self) -> None:
        """Reads the tasks' definitions and examples. Raises: UserError if they cannot be read."""
        _seed()
        names = ", ".join(self._names)
        try:
            self._loaded = self._manager.load(self._names)
        except UserError:
            raise
        except Exception as error:  # a task is code of its own, and its data may come from anywhere
            problem = f"expected tasks whose examples can be read, found {names}: {type(error).__name__}: "
            raise ArgumentError("tasks", problem + one_line(error, 300)) from error
        for name, task in self._loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise ArgumentError("tasks", f"expected tasks on text that run no code of the model, found {name}")

    def check(self, model: Engine, limit: int) -> None:
        """Prepares all requests of the tasks that were loaded, and computes nothing: the model needs no weights.

        Args:
          limit: as for `run`.
        Raises: UserError for a request that the model cannot serve.
        """
        self._of_loaded(_Checks(model), limit)

    def all_scores(self, model: Engine, limit: int, stopped: Callable[[], bool]) -> dict[str, dict[str, float]] | None:
        """Scores a model by all metrics of the tasks that were loaded, as `run` does but without standard errors.

        Args:
          limit: as for `run`.
          stopped: called between batches; if it returns True, the scoring ends without a result. With several
            processes all of them must get the same answers.
        Returns: {task or group: {metric: value}}, with the number of documents as "n"; None if it was stopped.
        Raises: UserError.
        """

        def report(_):
            if stopped():
                raise _StoppedError

        try:
            results = self._of_loaded(MemoryLLM(model, report), limit)
        except _StoppedError:
            return None
        return {task: _numbers(results, task) for task in results["results"]}

    def _of_loaded(self, model: MemoryLLM, limit: int) -> dict:
        """The harness's results on the tasks that were loaded. Raises: UserError."""
        _seed()
        for task in self._loaded["tasks"].values():  # as `simple_evaluate` sets them up
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        try:
            # Not `simple_evaluate`, which would read the examples again, and look into the machine for seconds.
            return evaluator.evaluate(model, self._loaded, limit=limit or None, bootstrap_iters=0, log_samples=False)
        except ImportError as error:
            raise self._missing_package(error) from error

    def run(
        self,
        model: Engine,
        about: dict,
        num_fewshot: int | None = None,
        limit: float = 0,
        output: str = "",
        log_samples: bool = False,
        bootstrap_iters: int = 100_000,
    ) -> dict:
        """Runs the tasks and writes the harness's result file, and with `log_samples` its files of samples beside it.

        Args:
          about: the description of the model that the file holds.
          num_fewshot: examples in a prompt; None: the task's own number.
          limit: documents of each task; a share of them if below 1; 0: all.
          output: path of the result file, or "" for none.
          bootstrap_iters: resamplings for the standard error of metrics like perplexity.
        Returns: the harness's results. Raises: UserError.
        """
        # The tracker chooses its files' names, so it writes to a temporary folder, and `_save` copies them from there.
        with tempfile.TemporaryDirectory() as folder:
            tracker = EvaluationTracker(output_path=os.path.join(folder, "results.json"))
            more = {"model_args": about, "bootstrap_iters": bootstrap_iters, "log_samples": log_samples}
            results = self._evaluate(model, num_fewshot, limit, evaluation_tracker=tracker, **more)
            if output:
                _save(tracker, results, folder, output)
        return results

    def _evaluate(self, model, num_fewshot, limit, **more):
        documents = None  # all of them
        if limit:
            documents = int(limit) if limit >= 1 else limit
        try:
            return lm_eval.simple_evaluate(
                MemoryLLM(model),
                tasks=self._names,
                num_fewshot=num_fewshot,
                limit=documents,
                task_manager=self._manager,
                **more,
            )
        except ImportError as error:
            raise self._missing_package(error) from error

    def _missing_package(self, error):
        names = ", ".join(self._names)
        return ArgumentError("tasks", f"expected the packages that {names} need, found one missing: {error}")

    @staticmethod
    def table(results: dict) -> str:
        """The harness's own text table of the results that `run` returns."""
        return "\n".join(make_table(results, column) for column in ("results", "groups") if column in results)


class _StoppedError(Exception):
    """The caller has asked to stop."""


def _seed() -> None:
    """Seeds the generators that tasks may draw from, as `simple_evaluate` does."""
    random.seed(0)
    np.random.seed(_SEED)


def _numbers(results, task) -> dict[str, float]:
    """{metric: value} of a task in the harness's results, and the number of its documents as "n"."""
    found = {}
    for key, value in results["results"][task].items():
        metric, comma, by = key.partition(",")  # the harness names a value METRIC,FILTER
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            found[metric if by == "none" else f"{metric}.{by}"] = float(value)
    samples = results["n-samples"]
    members = results["group_subtasks"].get(task) or [task]
    return found | {"n": sum(samples[name]["effective"] for name in members if name in samples)}


def _score(value: float, samples: list[dict], metric: str) -> Score:
    """A metric's value with what each example has of it, if the value is the mean of these."""
    of_examples = [sample.get(metric) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    if of_examples and all(isinstance(one, int | float) for one in of_examples):
        score = Score.of_examples(of_examples)
        if math.isclose(score.value, value):  # others, such as perplexities, are no means
            return score
    return Score(float(value))


def _save(tracker, results, folder, output):
    """Lets the tracker write its files to `folder`, then copies them to `output` and beside it. Raises: UserError."""
    samples = results.pop("samples", {})  # goes to files of its own, not into the result file
    tracker.save_results_aggregated(results, samples)
    for task, of_task in samples.items():
        tracker.save_results_samples(task, of_task)
    (found,) = glob.glob(os.path.join(folder, "results_*.json"))
    logged = glob.glob(os.path.join(folder, "samples_*.jsonl"))
    if len(logged) != len(samples):  # the tracker only logs an error when it cannot write
        raise UserError(f"{output}: the harness could not write the samples of {', '.join(samples)}")
    places = {path: os.path.join(os.path.dirname(output), os.path.basename(path)) for path in logged}
    places[found] = output
    for path, place in places.items():
        storage.write_bytes(place, storage.read_bytes(path, "results of the harness"))
