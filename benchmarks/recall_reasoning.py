"""Training text and tasks of recall and of reasoning that small models can learn, with known answers and known chance.

    python benchmarks/recall_reasoning.py --output=DIR
    python -m memoryllm_jax.prepare --input='DIR/text/train-*.json.gz' --output=DIR/data \\
        --validation_input='DIR/text/validation-*.json.gz' --tokenizer=sentencepiece:ENGLISH/tokenizer.model
    python -m memoryllm_jax.train ... --config.data.path=ENGLISH:0.7,DIR/data:0.3
    python -m memoryllm_jax.evaluate --workdir=WORKDIR --tasks='recall_*,reasoning_*' --task_path=DIR/tasks

LAMBADA and PIQA are at chance in models of a million parameters. In these tasks the right answer is one of four, so
that chance is 25%. The wrong ones are drawn as the right one is: guessing frequent words does not help.

Recall asks for facts of the made-up world of facts_world.py, which the training text states many times. The question
repeats nothing of the answer.
    recall_stated     in a form in which the text states the fact
    recall_rephrased  in the form in which the text states other facts of the relation, and never this one
Reasoning asks for what follows by a rule from a context that is new in each question; its words are those of the world.
    reasoning_copy    a list is repeated, up to some word: the next word of the list, or one of the later ones
    reasoning_lookup  pairs of an owner and a good, some of which are repeated in another order: the good of the next
                      owner, or one of others
    reasoning_cycle   words that come again and again in one order: the next word, or others of the cycle
Half of the text is of the world, and half are exercises. These go on after the answer: the more is repeated, the sooner
small models learn to repeat. Text and tasks are the same for the same seed.
"""

import json
import os
import random
from collections.abc import Callable
from typing import Annotated, NamedTuple

from facts_text import write_lines
from facts_world import FILLERS, GOODS, INSTRUMENTS, TRADES, Fact, World

from memoryllm_jax.common import cli, storage
from memoryllm_jax.common.options import Option

CHOICES = 4
_WORDS = (*GOODS, *INSTRUMENTS, *TRADES)
_SHARDS = 4
_VALIDATION = 40  # documents of held-out text to each million characters of training text


class Question(NamedTuple):
    """A text, the word that follows it by the rule, and words that could follow it by other rules.

    Attributes:
      context: the text, up to the space before the answer.
      answer: the right word.
      wrong: other words.
      rest: what follows the answer in the training text.
    """

    context: str
    answer: str
    wrong: tuple[str, ...]
    rest: str = "."


def copy(draw: random.Random) -> Question:
    """A list of words, and the start of its repetition."""
    words = draw.sample(_WORDS, draw.randint(CHOICES + 2, CHOICES + 4))
    at = draw.randrange(1, len(words) - CHOICES + 1)
    wrong = draw.sample(words[at + 1 :], CHOICES - 1)
    context = f"The list: {' '.join(words)}. Again: {' '.join(words[:at])}"
    again = f" Again: {' '.join(words)}."
    return Question(context, words[at], tuple(wrong), f" {' '.join(words[at + 1 :])}.{again * 2}")


def lookup(draw: random.Random) -> Question:
    """Who owns what, and its repetition in another order up to one of the owners."""
    owners, goods = draw.sample(TRADES, CHOICES + 1), draw.sample(GOODS, CHOICES + 1)
    pairs = [f"{owner} {good}" for owner, good in zip(owners, goods)]
    first, at, *later = draw.sample(range(CHOICES + 1), CHOICES + 1)
    wrong = [goods[k] for k in later]
    rest = "".join(f", {pairs[k]}" for k in later)
    for _ in range(2):
        rest += f". So {', '.join(draw.sample(pairs, len(pairs)))}"
    return Question(
        f"The owners: {', '.join(pairs)}. So {pairs[first]}, {owners[at]}", goods[at], tuple(wrong), f"{rest}."
    )


def cycle(draw: random.Random) -> Question:
    """Words that are repeated in one order, twice and up to some word."""
    words = draw.sample(_WORDS, draw.randint(CHOICES, CHOICES + 2))
    at = draw.randrange(1, len(words))
    wrong = draw.sample(words[:at] + words[at + 1 :], CHOICES - 1)
    rest = f" {' '.join(words[at + 1 :] + words * 2)}."
    return Question(f"The cycle: {' '.join(words * 2 + words[:at])}", words[at], tuple(wrong), rest)


RULES = {"reasoning_copy": copy, "reasoning_lookup": lookup, "reasoning_cycle": cycle}


def recall(draw: random.Random, world: World, fact: Fact, form: str) -> Question:
    """A question for a fact. The wrong answers are those of other facts of the relation, drawn at random."""
    others = [other.object for other in world.facts.values() if other.relation == fact.relation]
    wrong: list[str] = []
    while len(wrong) < CHOICES - 1:
        other = draw.choice(others)
        if other not in (fact.object, *wrong):
            wrong.append(other)
    return Question(f"{draw.choice(FILLERS)} {form.format(s=fact.subject)}", fact.object, tuple(wrong))


def exercises(draw: random.Random) -> str:
    """One document of training text: several exercises with their answers."""
    sentences = [draw.choice(FILLERS)]
    for _ in range(draw.randint(3, 5)):
        question = draw.choice(list(RULES.values()))(draw)
        sentences.append(f"{question.context} {question.answer}{question.rest}")
    return " ".join(sentences)


def tasks(world: World, count: int, seed: int) -> dict[str, list[Question]]:
    """The questions of each task. Each fact is asked for once, in one of both tasks, so that answers are independent.

    Args:
      count: questions of each rule.
    """
    draw = random.Random(f"tasks {seed}")
    facts = draw.sample(list(world.facts.values()), len(world.facts))
    half = len(facts) // 2
    found = {
        "recall_stated": [recall(draw, world, fact, draw.choice(world.stated_forms(fact))) for fact in facts[:half]],
        "recall_rephrased": [recall(draw, world, fact, world.withheld[fact]) for fact in facts[half:]],
    }
    for name, rule in RULES.items():
        found[name] = [_in_context(rule(draw), draw) for _ in range(count)]
    return found


def _in_context(question: Question, draw: random.Random) -> Question:
    """The question behind a sentence, as exercises stand in the training text."""
    return question._replace(context=f"{draw.choice(FILLERS)} {question.context}")


def write_tasks(folder: str, found: dict[str, list[Question]], seed: int) -> None:
    """Writes NAME.jsonl and NAME.yaml of each task, which name the folder: they are read where they were written."""
    draw = random.Random(f"order {seed}")
    os.makedirs(folder, exist_ok=True)
    for name, questions in found.items():
        lines = []
        for question in questions:
            choices = draw.sample((question.answer, *question.wrong), 1 + len(question.wrong))
            answer = choices.index(question.answer)
            lines.append(json.dumps({"context": question.context, "choices": choices, "answer": answer}))
        path = os.path.abspath(os.path.join(folder, f"{name}.jsonl"))
        storage.write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": path}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0, "chance": 1 / len(choices), "seed": seed},
        }
        storage.write_json(os.path.join(folder, f"{name}.yaml"), task)  # JSON is YAML


def write_text(folder: str, world: World, characters: int, seed: int) -> None:
    """Writes train-*.json.gz and validation-0.json.gz: half are documents of the world, the others exercises."""
    draw = random.Random(f"text {seed}")
    kinds: tuple[Callable[[], str], ...] = (lambda: world.document(draw), lambda: exercises(draw))
    documents = []
    for write in kinds:
        size = 0
        while size < characters / len(kinds):
            documents.append(write())
            size += len(documents[-1])
    draw.shuffle(documents)
    os.makedirs(folder, exist_ok=True)
    for shard in range(_SHARDS):
        write_lines(os.path.join(folder, f"train-{shard}.json.gz"), documents[shard::_SHARDS])
    held_out = [draw.choice(kinds)() for _ in range(max(1, characters * _VALIDATION // 1_000_000))]
    write_lines(os.path.join(folder, "validation-0.json.gz"), held_out)


def main(
    output: Annotated[str, Option("folder for text/ and tasks/", writes=True)],
    characters: Annotated[int, Option("of the training text", least=1)] = 20_000_000,
    questions: Annotated[int, Option("of each rule", least=1)] = 240,
    subjects: Annotated[int, Option("countries, and people, whose three facts each the text states", least=10)] = 24,
    seed: Annotated[int, Option("of the world, the text and the tasks")] = 0,
) -> None:
    world = World(subjects, subjects // 4, seed, withhold=True)
    write_text(os.path.join(output, "text"), world, characters, seed)
    found = tasks(world, questions, seed)
    write_tasks(os.path.join(output, "tasks"), found, seed)
    counts = ", ".join(f"{name} ({len(found[name])} questions)" for name in found)
    print(f"{output}: {characters:,} characters of text, {counts}")


if __name__ == "__main__":
    cli.run(main)
