"""A trained model for EleutherAI's lm-evaluation-harness (lm_eval), and runs of its tasks.

Texts become ids, and requests are cut to the context, as in the harness's own adapter for Hugging Face models (HFLM)
with a tokenizer that puts bos before a text if it has one, so that both give the same numbers for the same model.
"""

import difflib
import glob
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import Streamer

_CACHED_POSITIONS = 1 << 14  # positions a batch shard in the key-value cache while texts are generated
_GENERATION_SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")


class _Generation(NamedTuple):
    """How a task wants its texts generated: up to the first of the stop strings, at most `new` tokens."""

    sampling: Sampling
    stops: list[str]
    new: int


class MemoryLLM(TemplateLM):
    """An `Engine` as the harness sees models. Raises: UserError for requests that the model cannot serve."""

    max_gen_toks = 256  # new tokens where a task does not say, as in HFLM

    def __init__(self, model: Engine):
        super().__init__()
        self._model, self._tokenizer, self.max_length = model, model.tokenizer, model.context

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: bos, or eos where there is no bos."""
        for token in (self._tokenizer.bos_id, self._tokenizer.eos_id):
            if token is not None:
                return token
        raise UserError("a task with texts without context: expected a tokenizer with bos or eos, found neither")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        ids = self._tokenizer.encode_special(string)
        if add_special_tokens is False or self._tokenizer.bos_id is None:
            return ids
        return [self._tokenizer.bos_id, *ids]

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each request's continuation."""
        sequences = [self._sequence(*request) for request in requests]
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            print(f"{cut} requests are longer than the context of {self.max_length} and lose their beginnings")
        progress = Progress("score", sum(len(sequence) - 1 for sequence in sequences), "token")
        found = scoring.score(self._model.decoder, self._model.rows, sequences, self.max_length, progress)
        progress.close()
        answers = []
        for (texts, _, continuation), scores in zip(requests, found):
            of_continuation = slice(-len(continuation), None)
            total = scores.log_probs_T[of_continuation].sum(dtype=float)
            answers.append((float(total), bool(scores.greedy_T[of_continuation].all())))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _sequence(self, texts, context, continuation):
        """Context and continuation; what is too long loses its beginning. The last id is only predicted."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise UserError(
                f"a request: expected a context and a continuation of 1 to {self.max_length} tokens, found "
                f"{len(context)} and {len(continuation)} tokens of {texts and texts[1][:80]!r}"
            )
        return (context + continuation)[-(self.max_length + 1) :]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the context."""
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
        """Each context's new text, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts, seeds = [""] * len(requests), itertools.count()
        progress = Progress("generate", len(requests), "text")
        for members in groups.values():
            how = self._generation(normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks))
            prompts = {k: self._prompt(requests[k].args[0], how.new) for k in members}
            members.sort(key=lambda k: len(prompts[k]), reverse=True)  # what needs most memory comes first
            capacity = bucket(len(prompts[members[0]]) + how.new, self.max_length)
            size = self._model.decoder.shards * max(1, _CACHED_POSITIONS // capacity)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                for k, text in zip(batch, self._texts([prompts[k] for k in batch], how, next(seeds))):
                    texts[k] = text
                    self.cache_hook.add_partial("generate_until", requests[k].args, text)
                progress.update(progress.done + len(batch))
        progress.close()
        return texts

    def _prompt(self, text, new):
        """The end of a text's ids that leaves room for `new` tokens."""
        ids = self.tok_encode(text) or [self.prefix_token_id]
        return ids[new - self.max_length :]

    def _generation(self, settings) -> _Generation:
        for name, value in settings.items():
            # Of settings that we do not know, those are harmless that say what is done anyway, such as num_beams=1.
            if name not in _GENERATION_SETTINGS and value not in (None, False, 0, 1):
                expected = ", ".join(_GENERATION_SETTINGS)
                raise UserError(f"generation_kwargs: expected {expected}, found {name}={value}")
        new = settings["max_gen_toks"]
        if not 0 < new < self.max_length:
            raise UserError(
                f"generation_kwargs: expected max_gen_toks from 1 to {self.max_length - 1}, as the model's context is "
                f"{self.max_length}, found {new}"
            )
        temperature = settings.get("temperature", 1.0) if settings["do_sample"] else 0.0
        sampling = Sampling(float(temperature), settings.get("top_k") or 0, settings.get("top_p") or 1.0)
        stops = [stop for stop in handle_stop_sequences(settings["until"], None) if stop]
        return _Generation(sampling, stops, new)

    def _texts(self, prompts, how: _Generation, seed: int):
        """The new text of each prompt, cut before its first stop string."""
        stop_ids = set(self._tokenizer.stop_ids)
        ids, texts = [[] for _ in prompts], [""] * len(prompts)
        streams = [Streamer(self._tokenizer, []) for _ in prompts]
        running = set(range(len(prompts)))
        for step in self._model.generate(prompts, how.new, how.sampling, seed, stop_ids):
            running &= {k for k, _ in step}
            for k, token in step:
                if k in running:
                    ids[k].append(token)
                    texts[k] += streams[k].add(token)
            running -= {k for k in running if any(stop in texts[k] for stop in how.stops)}
            if not running:
                break
        return [postprocess_generated_text(self._tokenizer.decode(new), how.stops, None) for new in ids]


class Tasks:
    """Tasks by name: those of the harness, those in tasks/ beside this file, and those of a folder.

    Args:
      names: of tasks, groups or tags; may have * in them.
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
            include_defaults=not shipped.issuperset(names),  # the harness takes ten seconds to list its own tasks
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

    def scores(self, model: Engine, num_fewshot: int | None = None, limit: float = 0) -> dict[str, tuple[str, float]]:
        """Scores tasks by one metric each.

        Args:
          num_fewshot, limit: as for `run`.
        Returns: {task: (metric, value)}; the metric is accuracy ("acc") where the task has it. Raises: UserError.
        """
        results = self._evaluate(model, num_fewshot, limit, bootstrap_iters=0)
        scores = {}
        for task, higher_is_better in results["higher_is_better"].items():
            values = {key.partition(",")[0]: value for key, value in results["results"][task].items()}
            metrics = [metric for metric in ("acc", *higher_is_better) if metric in values]
            if metrics:  # a group of tasks may have no score of its own
                scores[task] = metrics[0], float(values[metrics[0]])
        return scores

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
          about: the model, as the file describes it.
          num_fewshot: examples in a prompt; None: as the task says.
          limit: documents of each task, or below 1 a share of them; 0: all.
          output: path of the result file, or "".
          bootstrap_iters: resamplings behind the standard error of metrics like perplexity.
        Returns: the harness's results. Raises: UserError.
        """
        # The tracker names its files itself, so it writes to a folder of its own.
        with tempfile.TemporaryDirectory() as folder:
            tracker = EvaluationTracker(output_path=os.path.join(folder, "results.json"))
            more = {"model_args": about, "bootstrap_iters": bootstrap_iters, "log_samples": log_samples}
            results = self._evaluate(model, num_fewshot, limit, evaluation_tracker=tracker, **more)
            if output:
                _save(tracker, results, folder, output)
        return results

    def _evaluate(self, model, num_fewshot, limit, **more):
        try:
            return lm_eval.simple_evaluate(
                MemoryLLM(model),
                tasks=self._names,
                num_fewshot=num_fewshot,
                limit=int(limit) if limit >= 1 else limit or None,
                task_manager=self._manager,
                **more,
            )
        except ImportError as error:
            names = ", ".join(self._names)
            raise ArgumentError("tasks", f"expected the packages of {names}, found one missing: {error}") from error

    @staticmethod
    def table(results: dict) -> str:
        """The harness's own table of what `run` returns."""
        return "\n".join(make_table(results, column) for column in ("results", "groups") if column in results)


def _save(tracker, results, folder, output):
    """Lets the tracker write its files to `folder`, and copies them to where they belong once all of them exist."""
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results, samples)
    for task, of_task in samples.items():
        tracker.save_results_samples(task, of_task)
    (found,) = glob.glob(os.path.join(folder, "results_*.json"))
    logged = glob.glob(os.path.join(folder, "samples_*.jsonl"))
    if len(logged) != len(samples):  # the tracker logs an error and goes on
        raise UserError(f"{output}: the harness could not write the samples of {', '.join(samples)}")
    places = {path: os.path.join(os.path.dirname(output), os.path.basename(path)) for path in logged}
    places[found] = output
    for path, place in places.items():
        storage.write_bytes(place, storage.read_bytes(path, "results of the harness"))
