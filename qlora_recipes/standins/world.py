"""An invented world of people, towns and guilds: from a seed to entities and facts.

Every name of a person, town, region or guild is made of random syllables, so that nothing in it is knowledge of
the real world. Knows nothing of how a fact is worded, of tokenizers or of models.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SEED = 2305
PEOPLE, GIVEN_NAMES, FAMILY_NAMES = 1200, 96, 96
TOWNS, REGIONS, GUILDS, TEACHERS = 60, 16, 60, 60
POPULARITY_SPREAD = 8.0
"""How many times more often the best known person is written about than the least known one. Between the two lie
facts that are known well, half and hardly, so that a little damage to the weights always finds some to break."""
TUNING_PEOPLE, HELD_OUT_PEOPLE = 400, 300

JOBS = """baker weaver potter miller tanner cooper glazier mason carpenter tailor cobbler barber clerk judge
doctor nurse painter printer binder sailor pilot fisher hunter shepherd farmer gardener beekeeper brewer cook
butcher smith jeweller dyer ropemaker saddler teller guard porter courier""".split()
ANIMALS = """heron badger fox hare weasel raven magpie falcon goose duck swan goat sheep donkey pony mule
cat hound ferret hedgehog mole newt toad frog tortoise lizard snake carp trout eel crab snail moth beetle cricket
pigeon parrot finch""".split()
COLOURS = """red orange yellow green blue purple pink brown black white grey gold silver copper bronze scarlet
crimson maroon amber ochre olive lime jade teal turquoise indigo violet lilac mauve lavender cream ivory beige
tan rust sand slate charcoal coral peach""".split()
DISHES = [
    f"{what} {dish}"
    for what in "plum onion barley mushroom walnut pepper apple cabbage".split()
    for dish in "soup pie stew bread cake".split()
]
INSTRUMENTS = """flute lute harp drum fiddle viola cello zither bagpipe trumpet horn trombone tuba oboe clarinet
bassoon recorder whistle guitar banjo mandolin dulcimer organ piano harpsichord bell gong cymbal tambourine
triangle xylophone marimba accordion concertina harmonica lyre sitar kettledrum piccolo bugle""".split()
GOODS = """rope sails barrels candles soap paper ink glass bricks tiles nails knives locks clocks maps lenses hats
gloves boots belts carpets curtains baskets combs brushes buttons needles thread lace ribbons""".split()

ONSETS = "b br d dr f g gr h k kr l m n p r s sh st t th tr v w z".split()
VOWELS = "a e i o u ai ea".split()
MIDDLES = ["", "", "l", "n", "r"]
ENDINGS = ["", "l", "m", "n", "r", "s", "th", "nd"]


@dataclass(frozen=True)
class Person:
    """Somebody of the world, with one value for each kind of fact."""

    given: str
    family: str
    is_woman: bool
    popularity: float
    """How often this person is written about, relative to the least known one."""
    facts: dict[str, str]
    """Kind of fact -> value: town, job, animal, door, dish, instrument, guild, teacher."""

    @property
    def name(self) -> str:
        return f"{self.given} {self.family}"


@dataclass(frozen=True)
class World:
    """Everything there is to know."""

    people: tuple[Person, ...]
    region_of: dict[str, str]
    """Town -> region."""
    goods_of: dict[str, str]
    """Guild -> what it makes."""

    @property
    def tuning_people(self) -> tuple[Person, ...]:
        """People whom the tuning rows ask about."""
        return self.people[TEACHERS : TEACHERS + TUNING_PEOPLE]

    @property
    def held_out_people(self) -> tuple[Person, ...]:
        """People whom only the held-out questions ask about."""
        return self.people[-HELD_OUT_PEOPLE:]

    def facts_of(self, person: Person) -> dict[str, tuple[str, ...]]:
        """Return every fact about a person, those of two steps as (first, second)."""
        first = {kind: (value,) for kind, value in person.facts.items()}
        town, guild, teacher = (person.facts[kind] for kind in ("town", "guild", "teacher"))
        return first | {
            "region": (town, self.region_of[town]),
            "goods": (guild, self.goods_of[guild]),
            "teacher's town": (teacher, self.town_of_teacher[teacher]),
        }

    @property
    def town_of_teacher(self) -> dict[str, str]:
        """Teacher -> the town where the teacher lives."""
        return {person.name: person.facts["town"] for person in self.people[:TEACHERS]}


def make_world(seed: int = SEED) -> World:
    """Invent a world; the same seed gives the same one."""
    rng = random.Random(seed)
    words = _invent_words(rng, GIVEN_NAMES + FAMILY_NAMES + TOWNS + REGIONS + GUILDS)
    given, family = _take(words, GIVEN_NAMES), _take(words, FAMILY_NAMES)
    towns, regions, guilds = _take(words, TOWNS), _take(words, REGIONS), _take(words, GUILDS)
    pairs = rng.sample([(first, last) for first in given for last in family], PEOPLE)
    teachers = [f"{first} {last}" for first, last in pairs[:TEACHERS]]
    values = {
        "town": towns,
        "job": JOBS,
        "animal": ANIMALS,
        "door": COLOURS,
        "dish": DISHES,
        "instrument": INSTRUMENTS,
        "guild": guilds,
        "teacher": teachers,
    }
    return World(
        people=tuple(_invent_person(rng, *pair, values) for pair in pairs),
        region_of={town: rng.choice(regions) for town in towns},
        goods_of={guild: rng.choice(GOODS) for guild in guilds},
    )


def _invent_person(rng: random.Random, given: str, family: str, values: dict[str, list[str]]) -> Person:
    return Person(
        given=given,
        family=family,
        is_woman=rng.random() < 0.5,
        popularity=math.exp(rng.random() * math.log(POPULARITY_SPREAD)),
        facts={kind: rng.choice(choices) for kind, choices in values.items()},
    )


def _invent_words(rng: random.Random, count: int) -> list[str]:
    """Make different capitalised words of two syllables."""
    words: dict[str, None] = {}
    while len(words) < count:
        syllables = (rng.choice(part) for part in (ONSETS, VOWELS, MIDDLES, ONSETS, VOWELS, ENDINGS))
        words["".join(syllables).capitalize()] = None
    return list(words)


def _take(words: list[str], count: int) -> list[str]:
    """Remove the last `count` words from a list and return them."""
    taken = words[-count:]
    del words[-count:]
    return taken
