"""Made-up facts taught by learned edits (`tol edit --teach`): what they change, and what they leave as it is.

    python benchmarks/facts.py --english=DIR --work=DIR --output=benchmarks/results/facts_cpu.json

Trains small models on English text mixed with documents of a made-up world (facts_world.py), so that they know its
relations and the six forms in which each is stated. `--english` is a folder with train-*.json.gz and
validation-*.json.gz, each with one {"text": ...} a line. Each fact is taught with the first form alone. Two kinds:

    new       about a subject that the text names without any fact
    changed   another object for a subject whose facts the text states, as in CounterFact (Meng et al. 2022)

Measured for each fact, as the share of prompts after which the object is the likeliest: the prompt that taught it; the
five other forms, behind a sentence; a paragraph that names the subject at its start and needs the fact at its end; the
forms behind a sentence about another edited subject, with 8 and with all edits in one overlay. What should stay: the
subject's other facts; neighbours, that is the same relation of other subjects, in text with and without the edited
token; and held-out English without it, which has to be the same bit by bit. Errors are standard errors over facts.
"""

import contextlib
import itertools
import json
import os
import random
from typing import Annotated, NamedTuple

import common
import facts_text
import numpy as np
from facts_world import FILLERS, RELATIONS, Fact, World, in_paragraph

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference import scoring
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.tol import compress, serving, teach
from memoryllm_jax.tol.edit import Editor
from memoryllm_jax.tol.edited_rows import EditedRows
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.training import loop

SUBJECTS = 120  # of each kind whose facts the text states; a third as many are bare
VOCAB, CHARACTERS = 4096, 7_000_000  # of each half of the training text
_WINDOWS, _WINDOW = 64, 128  # of held-out English


class Setting(NamedTuple):
    """How facts are taught.

    Attributes:
      method: of `teach.learn`.
      is_4bit: whether on the rows of a ToL file of 4 bits instead of live rows.
      along: whether the subject's other facts, in their first form, are lessons too, so that they stay.
    """

    method: teach.Method
    is_4bit: bool = False
    along: bool = False


SETTINGS = {
    "default": Setting(teach.Method()),
    "4-bit": Setting(teach.Method(), is_4bit=True),
    "along": Setting(teach.Method(), along=True),
    "keep-1": Setting(teach.Method(keep=1)),
    "keep-0": Setting(teach.Method(keep=0)),
    "keep-0-no-prefixes": Setting(teach.Method(keep=0, prefixes=0)),
}


class Probe(NamedTuple):
    """A text after which an object is expected.

    Attributes:
      measure: what it belongs to, such as "paraphrase".
      text, target: the text and what should follow it.
    """

    measure: str
    text: str
    target: str


class Trial:
    """A trained model, and facts that are taught to it one by one.

    Attributes:
      learned: what was learned of each fact that was taught.
    """

    def __init__(self, engine, world: World, setting: Setting):
        self.engine, self.world, self.setting = engine, world, setting
        self.memory = serving.memory_of(engine)
        self.learned: dict[Fact, teach.Learned] = {}

    def teach(self, fact: Fact) -> None:
        """Learns the fact; one that is not learned is left out."""
        facts = [fact, *(others_of(fact, self.world) if self.setting.along else ())]
        lessons = [teach.Lesson(one.prompts[0], one.target) for one in facts]
        with contextlib.suppress(UserError):
            self.learned[fact] = teach.learn(self.engine, lessons, [f" {fact.subject}"], method=self.setting.method)

    def edited(self, facts) -> RowSource:
        """The model's rows with the edits of these facts."""
        overlay = Overlay(self.memory)
        editor = Editor(overlay)
        for fact in facts:
            if fact in self.learned:
                editor.give(str(fact), self.learned[fact].rows)
        return EditedRows(self.engine.rows, overlay, self.engine.trained.mesh)

    def ask(self, rows: RowSource, probes: list[Probe]) -> np.ndarray:
        """(whether the target is likeliest, its probability) of each probe, float [n, 2]."""
        sequences, counts = [], []
        for _, text, target in probes:
            before, whole = self.engine.prompt(text), self.engine.prompt(text + target)
            sequences.append(whole)
            counts.append(len(whole) - len(before))
        scores = scoring.score(self.engine.decoder, rows, sequences, self.engine.context)
        return np.array([(s.greedy_T[-n:].all(), np.exp(s.log_probs_T[-n:].sum())) for s, n in zip(scores, counts)])


def others_of(fact: Fact, world: World) -> list[Fact]:
    """The other facts of its subject that the text states."""
    return [other for (name, kind), other in world.facts.items() if name == fact.subject and kind != fact.relation]


def probes_of(fact: Fact, world: World, draw: random.Random) -> list[Probe]:
    """What is asked about a fact and what lies near it."""
    kind = RELATIONS[fact.relation].kind
    found = [Probe("taught prompt", fact.prompts[0], fact.target)]
    found += [Probe("paraphrase", f"{draw.choice(FILLERS)} {text}", fact.target) for text in fact.prompts[1:]]
    for _ in range(4):
        text = f"{draw.choice(FILLERS)} {in_paragraph(fact, world, draw)}"
        found.append(Probe("in a paragraph", text, fact.target))
    for other in others_of(fact, world):
        texts = [f"{draw.choice(FILLERS)} {text}" for text in other.prompts[1:]]
        found += [Probe("other facts of the subject", text, other.target) for text in texts]
    others = [name for name in world.known[kind] if name != fact.subject]
    for name in draw.sample(others, 5):
        near = world.facts[name, fact.relation]
        found.append(Probe("neighbour", f"{draw.choice(FILLERS)} {near.prompts[0]}", near.target))
        front = f"{draw.choice(FILLERS)} {world.opening(draw, fact.subject, kind)}"
        found.append(Probe("neighbour after the subject", f"{front} {near.prompts[0]}", near.target))
    return found


def facts_to_teach(world: World, count: int, draw: random.Random) -> dict[str, list[Fact]]:
    """{kind: facts}, whose subjects are distinct. Raises: ArgumentError if the world has too few."""
    most = 2 * min(map(len, world.bare.values())) - 6
    if count > most:
        raise ArgumentError("facts", f"expected at most {most} with so few subjects, found {count}")
    relations = itertools.cycle(RELATIONS)
    bare = {kind: draw.sample(names, len(names)) for kind, names in world.bare.items()}
    known = {kind: draw.sample(names, len(names)) for kind, names in world.known.items()}
    chosen: dict[str, list[Fact]] = {"new": [], "changed": []}
    for _ in range(count):
        relation = next(relations)
        kind, objects = RELATIONS[relation].kind, world.objects[relation]
        chosen["new"].append(Fact(bare[kind].pop(), relation, draw.choice(objects)))
        old = world.facts[known[kind].pop(), relation]
        chosen["changed"].append(old._replace(object=draw.choice([name for name in objects if name != old.object])))
    return chosen


def measure(trial: Trial, facts: list[Fact], seed: int) -> dict:
    """Teaches the facts and asks about each of them with its own edit, then with several edits together."""
    draw = random.Random(seed)
    asked = [probes_of(fact, trial.world, draw) for fact in facts]
    before = [trial.ask(trial.engine.rows, probes) for probes in asked]
    after = []
    for fact, probes in zip(facts, asked):
        trial.teach(fact)
        after.append(trial.ask(trial.edited([fact]), probes))
        print(f"{fact.subject} {fact.relation}: {'taught' if fact in trial.learned else 'not taught'}", flush=True)
    result = {"facts": len(facts), "taught": len(trial.learned)}
    if trial.learned:
        result["change_over_norm"] = common.spread([x for one in trial.learned.values() for x in one.change.values()])
        result["steps"] = common.spread([one.steps for one in trial.learned.values()])
    for name in dict.fromkeys(probe.measure for probes in asked for probe in probes):
        result[name] = {"before": _shares(asked, before, name), "after": _shares(asked, after, name)}
    same = [a == b for probes, *both in zip(asked, before, after) for p, a, b in zip(probes, *both) if _is_far(p)]
    result["neighbours bit by bit the same"] = f"{sum(bool(x.all()) for x in same)} of {len(same)}"
    for count in dict.fromkeys((min(8, len(facts)), len(facts))):
        result[f"{count} edits at once"] = _together(trial, facts[:count], asked[:count], seed)
    return result


def _is_far(probe: Probe) -> bool:
    """Whether the probe is one without the edited token."""
    return probe.measure == "neighbour"


def _shares(asked, answers, measure: str) -> dict:
    """Share of prompts whose target is likeliest, and its mean probability, with standard errors over facts."""
    by_fact = []
    for probes, answer in zip(asked, answers):
        chosen = [number for number, probe in enumerate(probes) if probe.measure == measure]
        by_fact.append(answer[chosen].mean(0))
    mean, error = np.mean(by_fact, 0), np.std(by_fact, 0, ddof=1) / np.sqrt(len(by_fact))
    return dict(zip(("likeliest", "error", "probability"), np.round([mean[0], error[0], mean[1]], 4).tolist()))


def _together(trial, facts, asked, seed) -> dict:
    """The facts with all their edits in one overlay, and English that holds none of their tokens."""
    draw, rows = random.Random(seed), trial.edited(facts)
    crowded = []
    for number, fact in enumerate(facts):
        other = facts[number - 1]
        front = f"{draw.choice(FILLERS)} {trial.world.opening(draw, other.subject, RELATIONS[other.relation].kind)}"
        crowded.append([Probe("crowded", f"{front} {text}", fact.target) for text in fact.prompts])
    result = {name: _shares(asked, [trial.ask(rows, probes) for probes in asked], name) for name in _ABOUT}
    result["after another edited subject"] = _shares(crowded, [trial.ask(rows, p) for p in crowded], "crowded")
    return result | _english(trial, facts, rows)


_ABOUT = ("taught prompt", "paraphrase", "in a paragraph")


def _english(trial, facts, rows) -> dict:
    """How many windows of held-out English hold an edited token, and how many of the others score the same bits."""
    engine, data = trial.engine, Dataset(trial.engine.trained.run.data.path)
    count = min(_WINDOWS, data.validation.tokens // _WINDOW)
    windows = data.validation.read(0, count * _WINDOW).reshape(count, _WINDOW).tolist()
    edited = {token for fact in facts if fact in trial.learned for token in trial.learned[fact].rows}
    free = [ids for ids in windows if not edited & set(ids)]
    before, after = (scoring.score(engine.decoder, r, free, engine.context) for r in (engine.rows, rows))
    same = sum(np.array_equal(a.log_probs_T, b.log_probs_T) for a, b in zip(before, after))
    return {"english_windows": count, "with_an_edited_token": count - len(free), "others_bit_by_bit_the_same": same}


def train(architecture: str, seed: int, steps: int, data: str, work: str) -> str:
    """Trains a model of 5M parameters, unless it is there. Returns: its workdir."""
    c = default(architecture)
    c.seed, c.steps, c.batch_size, c.seq_len = seed, steps, 8, 256
    c.model.dim, c.model.layers, c.model.heads = 256, 4, 8
    c.model.dtype, c.model.loss_chunk = "float32", 512
    c.data.path, c.data.epochs = data, 4
    c.optimizer.peak_lr, c.optimizer.final_lr, c.optimizer.warmup_steps = 3e-3, 3e-4, min(40, steps // 2)
    c.checkpoint.every, c.eval.every, c.log.every, c.log.tensorboard = 300, 300, 20, False
    workdir = os.path.join(work, f"{architecture}-{seed}")
    if not os.path.exists(os.path.join(workdir, "result.json")):
        loop.train(resolve(c), workdir)
    return workdir


def main(
    english: Annotated[str, Option("folder with train-*.json.gz and validation-*.json.gz, one {text} a line")],
    work: Annotated[str, Option("folder for text, data, models and ToL files")],
    architectures: Annotated[tuple[str, ...], Option("architectures to train")] = ("memory", "flex-3"),
    seeds: Annotated[int, Option("models of each architecture", least=1)] = 2,
    settings: Annotated[tuple[str, ...], Option(f"of {', '.join(SETTINGS)}")] = tuple(SETTINGS),
    facts: Annotated[int, Option("facts of each kind that are taught to each model", least=2)] = 64,
    steps: Annotated[int, Option("training steps of 2,048 tokens", least=1)] = 1800,
    output: Annotated[str, Option("JSON file to write", writes=True)] = "",
) -> None:
    for name in settings:
        if name not in SETTINGS:
            raise ArgumentError("settings", f"expected some of {', '.join(SETTINGS)}, found {name!r}")
    world = World(SUBJECTS, SUBJECTS // 3)
    data = os.path.join(work, "data")
    if not os.path.exists(os.path.join(data, "dataset.json")):
        facts_text.write(work, english, world, VOCAB, CHARACTERS)
    results: dict = {}
    more = {"text": "half English, half documents of a made-up world that state its facts in the forms asked for"}
    for architecture, seed in itertools.product(architectures, range(seeds)):
        workdir = train(architecture, seed, steps, data, work)
        found = results[f"{architecture}, seed {seed}"] = {"validation_bits_per_byte": _bits(workdir)}
        chosen = facts_to_teach(world, facts, random.Random(seed))
        for name in settings:
            tol = os.path.join(work, f"{architecture}-{seed}-4bit.safetensors") if SETTINGS[name].is_4bit else ""
            if tol:
                compress.precompute(workdir, tol, compress.Options(bits="4"))
            with contextlib.closing(serving.open_engine(workdir, tol)) as engine:
                for kind, some in chosen.items():
                    trial = Trial(engine, world, SETTINGS[name])
                    found.setdefault(name, {})[kind] = measure(trial, some, seed)
                    common.write(output, results, more)


def _bits(workdir: str) -> float:
    with open(os.path.join(workdir, "result.json")) as file:
        return json.load(file)["validation"]["bits_per_byte"]


if __name__ == "__main__":
    cli.run(main)
