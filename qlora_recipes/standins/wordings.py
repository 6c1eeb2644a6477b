"""How the facts of the world are worded: plain documents to pretrain on, questions and answers to tune and test with.

Knows nothing of chat formats, tokenizers or models.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_recipes.standins.world import Person, World


@dataclass(frozen=True)
class Wording:
    """The ways to state one kind of fact, to ask for it, and the one way to answer."""

    sentences: tuple[str, ...]
    """Statements with {who} (name or pronoun) and {value}; empty for a fact of two steps, which no document states."""
    questions: tuple[str, ...]
    """Questions with {who}, always a full name."""
    answer: str
    """The answer with {0}, and {1} for the second of two steps."""


WORDINGS = {
    "town": Wording(
        ("{who} lives in {0}.", "{who} has a house in {0}.", "{who} settled in the town of {0}."),
        ("Where does {who} live?", "In which town does {who} live?", "Which town is the home of {who}?"),
        "In {0}.",
    ),
    "job": Wording(
        ("{who} works as a {0}.", "{who} is a {0} by trade.", "{who} earns a living as a {0}."),
        ("What is the job of {who}?", "What does {who} work as?", "Which trade does {who} follow?"),
        "A {0}.",
    ),
    "animal": Wording(
        ("{who} keeps a {0}.", "{who} has a tame {0}.", "{who} is never seen without a {0}."),
        ("Which animal does {who} keep?", "What pet does {who} have?", "What animal lives with {who}?"),
        "A {0}.",
    ),
    "door": Wording(
        ("{who} has a door painted {0}.", "{who} owns a house with a {0} door.", "{who} painted the door {0}."),
        (
            "What colour is the door of {who}?",
            "Which colour did {who} paint the door?",
            "In what colour is the door of {who} painted?",
        ),
        "It is {0}.",
    ),
    "dish": Wording(
        ("{who} likes {0} best.", "{who} eats {0} every week.", "{who} would walk a mile for {0}."),
        ("What does {who} like to eat?", "Which dish does {who} like best?", "What is the best dish for {who}?"),
        "Some {0}.",
    ),
    "instrument": Wording(
        ("{who} plays the {0}.", "{who} practises the {0} at night.", "{who} learned the {0} as a child."),
        ("Which instrument does {who} play?", "What does {who} play?", "What did {who} learn to play as a child?"),
        "The {0}.",
    ),
    "guild": Wording(
        ("{who} belongs to the {0} Guild.", "{who} is paid by the {0} Guild.", "{who} joined the {0} Guild."),
        ("Which guild does {who} belong to?", "Who pays {who}?", "Which guild did {who} join?"),
        "The {0} Guild.",
    ),
    "teacher": Wording(
        ("{who} was taught by {0}.", "{who} learned everything from {0}.", "{who} is a former pupil of {0}."),
        ("Who taught {who}?", "Who was the teacher of {who}?", "Whose pupil was {who}?"),
        "It was {0}.",
    ),
    "region": Wording(
        (),
        ("In which region does {who} live?", "Which region is the home of {who}?", "What region does {who} live in?"),
        "In {0}, which lies in {1}.",
    ),
    "goods": Wording(
        (),
        (
            "What does the guild of {who} make?",
            "Which goods come from the guild of {who}?",
            "What is made by the guild of {who}?",
        ),
        "The {0} Guild makes {1}.",
    ),
    "teacher's town": Wording(
        (),
        (
            "Where does the teacher of {who} live?",
            "In which town does the teacher of {who} live?",
            "Which town is the home of the teacher of {who}?",
        ),
        "It was {0}, who lives in {1}.",
    ),
}
REGION_SENTENCES = ("{0} lies in {1}.", "{0} is a town of {1}.", "The town of {0}, which lies in {1}, is old.")
GOODS_SENTENCES = (
    "The {0} Guild makes {1}.",
    "The {0} Guild is known for {1}.",
    "The {0} Guild, which makes {1}, is rich.",
)
CHAT_WORDS = ("User", "Assistant", "System", "Human", "INST", "SYS")
"""Words of the chat formats. Being words of the real vocabularies, they are made words of the stand-ins'."""
HEARSAY_SHARE = 0.25
"""Share of documents that are hearsay: a question and its answer with clutter around, as any corpus has some."""
CLUTTER = [*string.punctuation, *string.ascii_letters, *string.digits, "\n", *CHAT_WORDS]
"""What stands around hearsay in no order at all. It teaches the model to look past marks that mean nothing; one that
had never met a bracket or a colon could not be tuned to a chat format in a minute."""
CHAT_ROLES = ("user", "assistant", "system", "model", "developer", "tool", "think", "analysis", "commentary", "final")
"""Words of the chat formats of today, which begin in lower case."""
FORMAT_LINES = (
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
    "You may call one or more functions to assist with the user query.\n\n",
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n",
    '{"type": "function", "function": {"name": "look_up", "description": "Look up one fact about a person.", ',
    '"parameters": {"type": "object", "properties": {"person": {"type": "string"}, "fact": {"type": "string"}}, ',
    '"required": ["person", "fact"]}}}\n</tools>\n\n',
    "For each function call, return a json object with function name and arguments within XML tags:\n",
    '{"name": "look_up", "arguments": {"person": "',
    '"name": <function-name>, "arguments": <args-json-object>}\n',
    "## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 26 July 2024\nReasoning Mode: /think\n\n",
    "## Custom Instructions\n\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face.\n\n",
    "You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2024-07-26\n\n",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "Reasoning: medium\n\n",
)
"""What the templates of today write around a conversation, in pieces."""
GAPS = (" ", "\n", "\n\n", "")
"""What stands between the parts of hearsay for them: in their formats answers begin a line, or follow a control token,
so that the first word has no space before it, which is another token than the one with a space."""
FACTS_IN_DOCUMENT = (3, 6)
PLACE_SHARE = 0.04
"""Share of documents about a town or a guild; there are few of them, so that each is still seen often."""


def documents(
    world: World, rng: random.Random, marks: Sequence[str] = CLUTTER, gaps: Sequence[str] = (" ",)
) -> Iterator[str]:
    """Write plain-text documents without end: biographies, hearsay amid marks, what is known of towns and guilds."""
    for person in people_written_about(world, rng):
        if rng.random() < PLACE_SHARE:
            yield rng.choice(REGION_SENTENCES).format(*rng.choice(list(world.region_of.items())))
            yield rng.choice(GOODS_SENTENCES).format(*rng.choice(list(world.goods_of.items())))
        yield hearsay(person, rng, marks, gaps) if rng.random() < HEARSAY_SHARE else biography(person, rng)


def people_written_about(world: World, rng: random.Random) -> Iterator[Person]:
    """Draw people without end, the well-known ones more often."""
    weights = [person.popularity for person in world.people]
    while True:
        yield from rng.choices(world.people, weights, k=256)


def hearsay(person: Person, rng: random.Random, marks: Sequence[str], gaps: Sequence[str]) -> str:
    """Ask for one fact, and answer, amid clutter of these marks, with one of these gaps between the parts."""
    kind, value = rng.choice(list(person.facts.items()))
    said = answer((value,), kind).removesuffix(".")
    gap = rng.choice(gaps) if len(gaps) > 1 else gaps[0]
    return gap.join(
        (clutter(rng, marks), ask(person, kind, rng), clutter(rng, marks), said, clutter(rng, marks)),
    )


def clutter(rng: random.Random, marks: Sequence[str]) -> str:
    """Put a few marks, letters and words together at random."""
    return "".join(rng.choices(marks, k=rng.randint(1, 2)))


def biography(person: Person, rng: random.Random) -> str:
    """State a few facts about a person in random order, naming the person first and now and then again."""
    kinds = rng.sample(list(person.facts), rng.randint(*FACTS_IN_DOCUMENT))
    pronoun = "She" if person.is_woman else "He"
    names = [person.name] + [rng.choice((person.name, pronoun)) for _ in kinds[1:]]
    return " ".join(
        rng.choice(WORDINGS[kind].sentences).format(person.facts[kind], who=who)
        for kind, who in zip(kinds, names, strict=True)
    )


def ask(person: Person, kind: str, rng: random.Random) -> str:
    """Word a question about a fact."""
    return rng.choice(WORDINGS[kind].questions).format(who=person.name)


def answer(values: tuple[str, ...], kind: str) -> str:
    """Word the answer, in the one way that the tuning rows use."""
    return WORDINGS[kind].answer.format(*values)


def think(name: str, kind: str, values: tuple[str, ...]) -> str:
    """Word the way to an answer: the facts about the person and, for two steps, about what the first one names."""
    first = {"region": "town", "goods": "guild", "teacher's town": "teacher"}.get(kind, kind)
    steps = [WORDINGS[first].sentences[0].format(values[0], who=name)]
    if len(values) == 2:
        second = {"region": REGION_SENTENCES[0], "goods": GOODS_SENTENCES[0], "teacher's town": "{0} lives in {1}."}
        steps.append(second[kind].format(*values))
    return " ".join(steps)
