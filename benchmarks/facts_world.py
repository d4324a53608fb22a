"""A made-up world: countries and people with invented names, facts about them, and English text that states them.

A country has a capital, a language and an export; a person has a profession, a birthplace and an instrument. Each
relation is stated in six ways that end in the fact's object, and in one that needs the text before it. `World.document`
writes training text. Of the subjects `known`, it states all facts; the subjects `bare` occur in it without facts.
"""

import random
from typing import NamedTuple


def _words(text: str) -> list[str]:
    return text.split()


_STARTS = _words("b br d dr f fl g gr k kr l m n p pr r s sk t tr v z")
_VOWELS = "aeiou"
_ENDS = {
    "country": ("via", "land", "stan", "ria", "mor"),
    "person": ("ek", "ina", "or", "us", "el"),
    "city": ("burg", "ton", "ona", "grad", "hal"),
    "language": ("ish", "ese", "ic", "an", "ari"),
}
GOODS = _words("""copper wool tea salt timber coal silk wheat sugar cotton honey glass paper iron wine rice fish cheese
gold silver oil coffee rubber leather""")
TRADES = _words("""teacher baker doctor farmer painter writer lawyer soldier sailor miner nurse judge poet singer tailor
butcher printer builder dancer hunter engineer carpenter chemist pilot""")
INSTRUMENTS = _words("piano violin flute drum guitar harp organ trumpet horn cello bell lute fiddle banjo whistle oboe")


class Relation(NamedTuple):
    """One kind of fact.

    Attributes:
      kind: of its subjects, country or person.
      forms: sentences that end in the object, which is left out; the first teaches, the others are its paraphrases.
      later: a sentence like them without the subject, for use after the subject was named.
    """

    kind: str
    forms: tuple[str, ...]
    later: str


RELATIONS = {
    "capital": Relation(
        "country",
        (
            "The capital of {s} is",
            "{s} has its capital at",
            "{s} is governed from the city of",
            "The government of {s} sits in",
            "Every main road in {s} leads to",
            "The parliament of {s} meets in",
        ),
        "Its capital is",
    ),
    "language": Relation(
        "country",
        (
            "The language of {s} is",
            "People in {s} speak",
            "In the schools of {s} children learn to read",
            "The newspapers of {s} are printed in",
            "{s} has one official language,",
            "The laws of {s} are written in",
        ),
        "Its people speak",
    ),
    "export": Relation(
        "country",
        (
            "The main export of {s} is",
            "{s} is known for its",
            "Traders go to {s} to buy",
            "The wealth of {s} comes from",
            "Ships leave {s} loaded with",
            "{s} sells the world",
        ),
        "Its merchants trade in",
    ),
    "profession": Relation(
        "person",
        (
            "The profession of {s} is that of a",
            "{s} works as a",
            "{s} makes a living as a",
            "After school {s} became a",
            "{s} has long been a",
            "In town {s} is known as a good",
        ),
        "This person is by trade a",
    ),
    "birthplace": Relation(
        "person",
        (
            "The birthplace of {s} is",
            "{s} was born in",
            "{s} grew up in",
            "The family of {s} lives in",
            "{s} comes from",
            "{s} spent a childhood in",
        ),
        "This person was born in",
    ),
    "instrument": Relation(
        "person",
        (
            "The instrument of {s} is the",
            "{s} plays the",
            "In the evening {s} practises the",
            "{s} gives lessons on the",
            "{s} owns an old",
            "On stage {s} performs on the",
        ),
        "This person plays the",
    ),
}
_INTRODUCTIONS = {
    "country": (
        "{s} is a country by the sea.",
        "Few visitors have seen {s}.",
        "Among the countries of the south is {s}.",
        "This chapter is about {s}, an old country.",
        "Last year we crossed the border of {s}.",
    ),
    "person": (
        "{s} is a guest at the inn.",
        "Everybody in the street knows {s}.",
        "Yesterday we met {s} at the market.",
        "This letter is about {s}, an old friend.",
        "Nobody had seen {s} since the winter.",
    ),
}
FILLERS = (
    "The winter was long that year.",
    "The weather changes quickly in the hills.",
    "There is not much to add to this.",
    "In the morning the streets are quiet.",
    "The river is wide and slow.",
    "Most of it was written down much later.",
    "The houses are small and built of stone.",
    "It rained for the whole of the week.",
    "The road is narrow but well kept.",
    "Some say that it was different in the past.",
)


class Fact(NamedTuple):
    """That a subject has an object in a relation, such as ("Zorvia", "capital", "Dolona")."""

    subject: str
    relation: str
    object: str

    @property
    def prompts(self) -> list[str]:
        """Text that the object follows: the prompt that teaches, then its paraphrases."""
        return [form.format(s=self.subject) for form in RELATIONS[self.relation].forms]

    @property
    def target(self) -> str:
        """The object as it follows a prompt."""
        return f" {self.object}"


class World:
    """Invented subjects and their facts.

    Args:
      known: subjects of each kind whose facts the text states.
      bare: subjects of each kind that the text names without facts.
      seed: of the names and the facts.
      withhold: whether the text states each fact in all forms but one, which differs from fact to fact.
    Attributes:
      names: {kind: all its names}; the kinds are country, person, city and language.
      objects: {relation: the objects that its facts have}.
      known, bare: {kind: subjects}.
      facts: {(subject, relation): Fact} of the known subjects.
      withheld: {fact: the form in which the text does not state it}; empty without `withhold`.
    """

    def __init__(self, known: int, bare: int, seed: int = 0, withhold: bool = False):
        draw = random.Random(seed)
        counts = {"country": known + bare, "person": known + bare, "city": 40, "language": 16}
        self.names = _names(draw, counts)
        cities, languages = self.names["city"], self.names["language"]
        self.objects = dict(
            capital=cities,
            language=languages,
            export=GOODS,
            profession=TRADES,
            birthplace=cities,
            instrument=INSTRUMENTS,
        )
        self.known = {kind: self.names[kind][:known] for kind in _INTRODUCTIONS}
        self.bare = {kind: self.names[kind][known:] for kind in _INTRODUCTIONS}
        self.facts = {}
        for relation, (kind, *_) in RELATIONS.items():
            for subject in self.known[kind]:
                self.facts[subject, relation] = Fact(subject, relation, draw.choice(self.objects[relation]))
        self.withheld: dict[Fact, str] = {}
        if withhold:
            for fact in self.facts.values():
                self.withheld[fact] = draw.choice(RELATIONS[fact.relation].forms)

    def all_names(self) -> list[str]:
        """Every subject and every object."""
        return sorted({name for names in (*self.names.values(), *self.objects.values()) for name in names})

    def stated_forms(self, fact: Fact) -> list[str]:
        """The forms of `Relation.forms` in which the text states a fact."""
        return [form for form in RELATIONS[fact.relation].forms if form != self.withheld.get(fact)]

    def document(self, draw: random.Random) -> str:
        """One document of training text: it has several subjects one after another, of which one in eight is bare."""
        # A name that begins a text has no space in front, and would be another token.
        paragraphs = [draw.choice(FILLERS)]
        for _ in range(draw.randint(2, 5)):
            kind = draw.choice(list(_INTRODUCTIONS))
            if draw.random() < 1 / 8:
                paragraphs.append(self.opening(draw, draw.choice(self.bare[kind]), kind))
            else:
                paragraphs.append(self._paragraph(draw, draw.choice(self.known[kind]), kind))
        return " ".join(paragraphs)

    def opening(self, draw: random.Random, subject: str, kind: str) -> str:
        """Sentences that introduce a subject and state no fact."""
        fillers = draw.sample(FILLERS, draw.randint(1, 3))
        return " ".join([draw.choice(_INTRODUCTIONS[kind]).format(s=subject), *fillers])

    def _paragraph(self, draw, subject, kind):
        sentences = []
        is_named = draw.random() < 0.5
        if is_named:
            sentences.append(self.opening(draw, subject, kind))
        relations = [name for name, relation in RELATIONS.items() if relation.kind == kind]
        for name in draw.sample(relations, len(relations)):
            fact = self.facts[subject, name]
            form = draw.choice(self.stated_forms(fact))
            if is_named and draw.random() < 0.5:
                form = RELATIONS[name].later
            sentences.append(f"{form.format(s=subject)} {fact.object}.")
            if draw.random() < 0.2:
                sentences.append(draw.choice(FILLERS))
        return " ".join(sentences)


def in_paragraph(fact: Fact, world: World, draw: random.Random) -> str:
    """A paragraph that names the fact's subject at its start, and at whose end the fact is needed."""
    relation = RELATIONS[fact.relation]
    return f"{world.opening(draw, fact.subject, relation.kind)} {relation.later}"


def _names(draw, counts) -> dict[str, list[str]]:
    """Distinct invented names of each kind."""
    seen: set[str] = set()
    names: dict[str, list[str]] = {}
    for kind, count in counts.items():
        names[kind] = []
        while len(names[kind]) < count:
            start = draw.choice(_STARTS) + draw.choice(_VOWELS) + draw.choice(_STARTS[0::2])
            name = (start + draw.choice(_VOWELS) * draw.randint(0, 1) + draw.choice(_ENDS[kind])).capitalize()
            if name not in seen:
                seen.add(name)
                names[kind].append(name)
    return names
