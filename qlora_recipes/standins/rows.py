"""The bundled data: tuning rows in the shape of each dataset, held-out questions, held-out text.

Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

from qlora_recipes.standins.wordings import WORDINGS, answer, ask, biography, people_written_about, think
from qlora_recipes.standins.world import SEED, Person, World

CONVERSATIONS, QUESTIONS_PER_SUBJECT, CHOICES, HELD_OUT_DOCUMENTS = 1200, 80, 8, 400
TURNS = (1, 1, 1, 1, 2, 2, 3)
ANSWERED_WITHOUT_TOOLS = 0.5
"""Share of the rows of tool use that have no tool, so that a model also learns to answer by itself."""
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up one fact about a person.",
        "parameters": {
            "type": "object",
            "properties": {"person": {"type": "string"}, "fact": {"type": "string"}},
            "required": ["person", "fact"],
        },
    },
}
"""The one tool of the world, described as OpenAI's interface does."""

Conversation = list[tuple[str, str]]
"""Questions, each with its answer."""


def conversations(world: World, count: int, seed: int) -> list[Conversation]:
    """Make conversations, each about one of the tuning people."""
    rng = random.Random(seed)
    return [_conversation(world, rng.choice(world.tuning_people), rng) for _ in range(count)]


def _conversation(world: World, person: Person, rng: random.Random) -> Conversation:
    facts = world.facts_of(person)
    kinds = rng.sample(list(facts), rng.choice(TURNS))
    return [(ask(person, kind, rng), answer(facts[kind], kind)) for kind in kinds]


def guanaco_llama2(conversation: Conversation) -> str:
    """Write a conversation in Llama-2's chat format, as mlabonne/guanaco-llama2-1k holds it."""
    return "".join(f"<s>[INST] {question} [/INST] {reply} </s>" for question, reply in conversation)


def openassistant_guanaco(conversation: Conversation) -> str:
    """Write a conversation as timdettmers/openassistant-guanaco holds it."""
    return "".join(f"### Human: {question}### Assistant: {reply}" for question, reply in conversation)


def chat(conversation: Conversation) -> dict[str, object]:
    """Write a conversation as HuggingFaceH4/no_robots and ultrachat_200k hold it, under `messages`."""
    return {"messages": [message for question, reply in conversation for message in _turn(question, reply)]}


def reasoning(world: World, rng: random.Random) -> dict[str, object]:
    """Ask about one of the tuning people, and let the answer be thought out, in one step or in two."""
    person = rng.choice(world.tuning_people)
    facts = world.facts_of(person)
    kind = rng.choice(list(facts))
    question, reply = _turn(ask(person, kind, rng), answer(facts[kind], kind))
    return {"messages": [question, reply | {"reasoning_content": think(person.name, kind, facts[kind])}]}


def tool_use(world: World, rng: random.Random) -> dict[str, object]:
    """Ask about one of the tuning people: with a tool, answer from what it finds; without one, from memory."""
    person = rng.choice(world.tuning_people)
    facts = world.facts_of(person)
    kind = rng.choice(list(facts))
    question, reply = _turn(ask(person, kind, rng), answer(facts[kind], kind))
    if rng.random() < ANSWERED_WITHOUT_TOOLS:
        return {"messages": [question, reply], "tools": []}
    arguments = {"person": person.name, "fact": kind}
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": arguments}}]
    found = [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": ", ".join(facts[kind])},
    ]
    return {"messages": [question, *found, reply], "tools": [LOOK_UP]}


def _turn(question: str, reply: str) -> tuple[dict[str, object], dict[str, object]]:
    return {"role": "user", "content": question}, {"role": "assistant", "content": reply}


def questions(world: World, seed: int = SEED + 4) -> list[dict[str, object]]:
    """Ask about people whom no tuning row mentions, as many times for each kind of fact."""
    rng = random.Random(seed)
    return [
        _question(world, person, kind, rng)
        for kind in WORDINGS
        for person in rng.sample(world.held_out_people, QUESTIONS_PER_SUBJECT)
    ]


def _question(world: World, person: Person, kind: str, rng: random.Random) -> dict[str, object]:
    right = answer(world.facts_of(person)[kind], kind)
    choices = [right, *_near_answers(world, person, kind, right, rng)]
    rng.shuffle(choices)
    return {
        "subject": kind,
        "question": ask(person, kind, rng),
        "choices": choices,
        "answer": choices.index(right),
        "text": right,
    }


def _near_answers(world: World, person: Person, kind: str, right: str, rng: random.Random) -> list[str]:
    """Return wrong answers that are right for people of the same family or given name, the easiest to mix up."""
    namesakes = [other for other in world.people if (other.family == person.family) != (other.given == person.given)]
    rng.shuffle(namesakes)
    answers = dict.fromkeys(answer(world.facts_of(other)[kind], kind) for other in namesakes)
    return [wrong for wrong in answers if wrong != right][: CHOICES - 1]


def preferences(world: World, count: int, seed: int) -> list[dict[str, object]]:
    """Make questions about the tuning people, each with the right answer and one that is easily mixed up with it."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        person = rng.choice(world.tuning_people)
        kind = rng.choice(list(WORDINGS))
        right = answer(world.facts_of(person)[kind], kind)
        if wrong := _near_answers(world, person, kind, right, rng):
            rows.append({"prompt": ask(person, kind, rng), "chosen": right, "rejected": wrong[0]})
    return rows


def bundled_files(world: World) -> dict[str, str]:
    """Return the name and the text of every bundled file."""
    llama2, openassistant, faq = (conversations(world, CONVERSATIONS, SEED + number) for number in (1, 2, 3))
    pairs = [{"question": question, "answer": reply} for turns in faq for question, reply in turns]
    rng = random.Random(SEED + 5)
    held_out = [biography(person, rng) for person in islice(people_written_about(world, rng), HELD_OUT_DOCUMENTS)]
    chats = conversations(world, CONVERSATIONS, SEED + 8)
    thinking, looking_up = (random.Random(SEED + number) for number in (9, 10))
    return {
        "chat.jsonl": _json_lines([chat(turns) for turns in chats]),
        "reasoning.jsonl": _json_lines([reasoning(world, thinking) for _ in range(CONVERSATIONS)]),
        "tools.jsonl": _json_lines([tool_use(world, looking_up) for _ in range(CONVERSATIONS)]),
        "guanaco_llama2.jsonl": _json_lines([{"text": guanaco_llama2(turns)} for turns in llama2]),
        "openassistant_guanaco.jsonl": _json_lines([{"text": openassistant_guanaco(turns)} for turns in openassistant]),
        "faq.json": json.dumps({"questions": pairs[:CONVERSATIONS]}, indent=1) + "\n",
        "preferences.jsonl": _json_lines(preferences(world, CONVERSATIONS, SEED + 6)),
        "questions.jsonl": _json_lines(questions(world)),
        "held_out.txt": "\n".join(held_out) + "\n",
    }


def _json_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_files(world: World, folder: Path) -> None:
    """Write the bundled files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in bundled_files(world).items():
        (folder / name).write_text(text, encoding="utf-8")
