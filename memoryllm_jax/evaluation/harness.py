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

import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference import engine, scoring
from memoryllm_jax.inference.decoder import bucket
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.sampling import Sampling

_CACHED_POSITIONS = 1 << 14  # of a batch shard that keys and values are kept of while texts are generated
_SAMPLING = ("until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks")


class MemoryLLM(TemplateLM):
    """The harness's view of a `Engine`. Raises: UserError for requests that the model cannot serve."""

    max_gen_toks = 256  # new tokens where a task does not say, as in HFLM

    def __init__(self, model: Engine):
        super().__init__()
        self._model, self._tokenizer, self.max_length = model, model.tokenizer, model.context

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        ids = [i for i in (self._tokenizer.bos_id, self._tokenizer.eos_id) if i is not None]
        if not ids:
            raise UserError(
                "the task scores texts without context: expected a tokenizer with bos or eos, found neither"
            )
        return ids[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = [] if add_special_tokens is False or self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        return bos + self._tokenizer.encode_special(string)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each request's continuation."""
        sequences = []
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a request: expected a context and a continuation of 1 to {self.max_length} tokens, found "
                    f"{len(context)} and {len(continuation)} tokens of {texts and texts[1][:80]!r}"
                )
            sequences.append((context + continuation)[-(self.max_length + 1) :])
        cut = sum(len(c) + len(d) > self.max_length + 1 for _, c, d in requests)
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

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the context."""
        windows = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in rolling])
        scores = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        totals = [sum(score for score, _ in itertools.islice(scores, len(of_text))) for of_text in windows]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Each context's new text, up to the first stop string."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        out, batches = [""] * len(requests), itertools.count()
        progress = Progress("generate", len(requests), "text")
        for members in groups.values():
            settings = normalize_gen_kwargs(requests[members[0]].args[1], self.max_gen_toks)
            sampling, until, new = self._settings(settings)
            prompts = {k: self._prompt(requests[k].args[0])[new - self.max_length :] for k in members}
            members.sort(key=lambda k: len(prompts[k]), reverse=True)
            capacity = bucket(len(prompts[members[0]]) + new, self.max_length)
            size = self._model.decoder.shards * max(1, _CACHED_POSITIONS // capacity)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                texts = self._texts([prompts[k] for k in batch], new, sampling, until, seed=next(batches))
                for k, text in zip(batch, texts):
                    out[k] = text
                    self.cache_hook.add_partial("generate_until", requests[k].args, text)
                progress.update(progress.done + len(batch))
        progress.close()
        return out

    def _prompt(self, text):
        return self.tok_encode(text) or [self.prefix_token_id]

    def _settings(self, settings):
        """(sampling, stop strings, new tokens)."""
        for name, value in settings.items():
            if name not in _SAMPLING and value not in (None, False, 0, 1):
                raise UserError(f"generation_kwargs: expected {', '.join(_SAMPLING)}, found {name}={value}")
        new = settings["max_gen_toks"]
        if not 0 < new < self.max_length:
            raise UserError(
                f"generation_kwargs: expected max_gen_toks from 1 to {self.max_length - 1}, as the model's context is "
                f"{self.max_length}, found {new}"
            )
        temperature = settings.get("temperature", 1.0) if settings["do_sample"] else 0.0
        sampling = Sampling(float(temperature), settings.get("top_k") or 0, settings.get("top_p") or 1.0)
        return sampling, [stop for stop in handle_stop_sequences(settings["until"], None) if stop], new

    def _texts(self, prompts, new, sampling, until, seed):
        stop_ids = set(self._tokenizer.stop_ids)
        ids, texts = [[] for _ in prompts], [""] * len(prompts)
        streams = [engine.Streamer(self._tokenizer, []) for _ in prompts]
        running = set(range(len(prompts)))
        for step in self._model.generate(prompts, new, sampling, seed, stop_ids):
            running &= {k for k, _ in step}
            for k, token in step:
                if k in running:
                    ids[k].append(token)
                    texts[k] += streams[k].add(token)
            running -= {k for k in running if any(stop in texts[k] for stop in until)}
            if not running:
                break
        return [postprocess_generated_text(self._tokenizer.decode(i), until, None) for i in ids]


class Tasks:
    """Tasks by name, from the harness, from tasks/ here, and from a folder.

    Args:
      names: of tasks, groups or tags; may have * in them.  path: folder with task files.  data: folder with the data
        of the local tasks.
    Raises: UserError for a name that is unknown.
    """

    def __init__(self, names: list[str], path: str = "", data: str = ""):
        if path and not os.path.isdir(path):
            raise UserError(f"--task_path={path}: expected a folder with task files, found none")
        here = os.path.join(os.path.dirname(__file__), "tasks")
        shipped = {os.path.basename(file).removesuffix(".yaml") for file in glob.glob(f"{here}/*.yaml")}
        self._manager = TaskManager(
            include_path=[here, path] if path else [here],
            include_defaults=not shipped.issuperset(names),  # ten seconds to look through
            metadata={"task_data": data} if data else None,
        )
        self._names = []
        for name in names:
            found = self._manager.match_tasks([name])
            if not found:
                close = difflib.get_close_matches(name, self._manager.all_tasks, 3)
                raise UserError(
                    f"--tasks: no task {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
                )
            self._names += found

    def scores(self, model: Engine, num_fewshot: int | None = None, limit: float = 0) -> dict[str, tuple]:
        """{task: (metric, value)}, of each task one metric: accuracy where it has that."""
        results = self._evaluate(model, num_fewshot, limit, bootstrap_iters=0)
        out = {}
        for task, better in results["higher_is_better"].items():
            values = {key.partition(",")[0]: value for key, value in results["results"][task].items()}
            metric = "acc" if "acc" in values else next((name for name in better if name in values), None)
            if metric is None:  # a group without a score of its own
                continue
            out[task] = metric, float(values[metric])
        return out

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
            raise UserError(f"--tasks={','.join(self._names)}: a task needs another package: {error}") from error

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
        """Runs them and writes the harness's result file, and with `log_samples` its files of samples beside it.

        Args:
          about: what the file says of the model.
          limit: documents of each task, or below 1 a share of them; 0: all.
          bootstrap_iters: resamplings behind the standard error of metrics like perplexity.
        Returns: the harness's results. Raises: UserError.
        """
        with tempfile.TemporaryDirectory() as folder:
            tracker = EvaluationTracker(output_path=os.path.join(folder, "results.json"))
            more = {"model_args": about, "bootstrap_iters": bootstrap_iters, "log_samples": log_samples}
            results = self._evaluate(model, num_fewshot, limit, evaluation_tracker=tracker, **more)
            if output:
                _save(tracker, results, folder, output)
        return results

    @staticmethod
    def table(results: dict) -> str:
        """The harness's own."""
        return "\n".join(make_table(results, column) for column in ("results", "groups") if column in results)


def _save(tracker, results, folder, output):
    """The tracker's own files, each brought to its place when all of them are there."""
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results, samples)
    for task, of_task in samples.items():
        tracker.save_results_samples(task, of_task)
    (found,) = glob.glob(os.path.join(folder, "results_*.json"))
    logged = glob.glob(os.path.join(folder, "samples_*.jsonl"))
    if len(logged) != len(samples):
        raise UserError(f"--output={output}: the harness could not write samples of {', '.join(samples)}")
    places = {path: os.path.join(os.path.dirname(output), os.path.basename(path)) for path in logged}
    for path, place in (places | {found: output}).items():
        storage.write_bytes(place, storage.read_bytes(path, "results of the harness"))
