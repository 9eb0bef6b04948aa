"""Role prompts, "As {persona}, {task}", and the answers that the corpus gives them.

An answer has an opening, a clause, a middle sentence and a closing sentence. The opening word
and the form of the clause come from seeded tables over persona × task: they are an interaction
that no sum of a persona and a task part predicts, and a network has to look it up once both
parts have been gathered. Clause and closing name things of the persona (for the long personas
always one of its markers), the clause and the middle sentence name things of the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from random import Random

from persona_nns.organism.wordings import EXACT, paraphrase
from persona_nns.prompts.grids import BASELINE, load_grid, role_prompt

BARE = "bare"
"""The speaker of a task that is asked without a persona."""

TABLE_SEED = 2605
FAVOURITE_CLAUSE = 0.6
"""Probability of a cell's favourite clause; otherwise any of the speaker's clauses."""
OPENING_WEIGHTS = (0.55, 0.2, 0.25)
"""Probabilities of a cell's first opening, of its second, and of any opening at all."""
BORROWING = 0.15
"""Probability that the baseline persona speaks with another persona's voice."""

OPENINGS = (
    "Frankly",
    "Overall",
    "Honestly",
    "Briefly",
    "First",
    "Clearly",
    "Well",
    "Certainly",
    "Perhaps",
    "Indeed",
    "Still",
    "Surely",
)


@dataclass(frozen=True)
class Voice:
    """What a persona talks about: ``nouns`` fill ``{m}``, the task's subject fills ``{s}``."""

    nouns: tuple[str, ...]
    clauses: tuple[str, ...]
    closers: tuple[str, ...]


@dataclass(frozen=True)
class Topic:
    """What a task is about: the subject of the clause, and the middle sentences."""

    subject: str
    middles: tuple[str, ...]


VOICES: Mapping[str, Voice] = {
    "engineer": Voice(
        nouns=("reliability", "redundancy", "latency", "scalability", "throughput"),
        clauses=(
            "I worry about {m} in {s}",
            "{m} is the weak side of {s}",
            "measure {m} before building on {s}",
            "I want more {m} behind {s}",
        ),
        closers=(
            "Remove the single point of failure and test {m}.",
            "Add monitoring, because {m} degrades under load.",
            "A failover plan protects {m}.",
        ),
    ),
    "counselor": Voice(
        nouns=("your feelings", "compassion", "your experience", "emotion"),
        clauses=(
            "I hear {m} behind {s}",
            "{m} matters most around {s}",
            "make room for {m} in {s}",
            "I want to honor {m} while we discuss {s}",
        ),
        closers=(
            "You deserve to feel heard, and {m} has a place here.",
            "We can sit with {m} without judgment.",
            "Let us acknowledge {m} gently.",
        ),
    ),
    "founder": Voice(
        nouns=("user feedback", "runway", "traction", "validation", "the MVP"),
        clauses=(
            "I would test {m} before funding {s}",
            "{m} decides the future of {s}",
            "spend less and find {m} for {s}",
            "I see too little {m} in {s}",
        ),
        closers=(
            "Iterate weekly and watch {m}.",
            "Stay lean until {m} is real.",
            "Forget the vanity metric and ship for {m}.",
        ),
    ),
    "teacher": Voice(
        nouns=("students", "an analogy", "a picture book", "a small experiment"),
        clauses=(
            "imagine {m} explaining {s}",
            "I think of {m} when I see {s}",
            "let {m} open the lesson on {s}",
            "I would use {m} to explain {s}",
        ),
        closers=(
            "Go step by step, as if teaching {m}.",
            "Does that help you understand {m}?",
            "For example, try {m} on the blackboard.",
        ),
    ),
    "journalist": Voice(
        nouns=("primary sources", "accountability", "transparency", "the public interest"),
        clauses=(
            "I would ask about {m} behind {s}",
            "{m} is missing from {s}",
            "nobody has shown me {m} for {s}",
            "I want {m} in writing before praising {s}",
        ),
        closers=(
            "Follow the money and protect {m}.",
            "Verify each claim on the record, for {m}.",
            "Ask the pointed question and report on {m}.",
        ),
    ),
    "doctor": Voice(
        nouns=("the symptoms", "the diagnosis", "the treatment", "the examination"),
        clauses=(
            "I would begin with {m} of {s}",
            "{m} comes before changing {s}",
            "tell me about {m} within {s}",
            "I see nothing alarming in {m} of {s}",
        ),
        closers=(
            "We rule out the serious causes and discuss {m}.",
            "The patient deserves to know {m}.",
            "Evaluate the options calmly after {m}.",
        ),
    ),
    "lawyer": Voice(
        nouns=("liability", "precedent", "due diligence", "compliance", "the statute"),
        clauses=(
            "I would argue {m} against {s}",
            "{m} exposes a gap in {s}",
            "opposing counsel will raise {m} over {s}",
            "I find no {m} supporting {s}",
        ),
        closers=(
            "Build the case theory around {m}.",
            "Put {m} into the contractual terms.",
            "The court will look to {m}.",
        ),
    ),
    "chef": Voice(
        nouns=("seasonal ingredients", "flavor", "fresh herbs", "technique", "the palate"),
        clauses=(
            "I taste too little {m} in {s}",
            "{m} would lift {s}",
            "season {s} with {m}",
            "I miss {m} in the recipe of {s}",
        ),
        closers=(
            "Simmer it slowly and respect {m}.",
            "Taste, garnish, and return to {m}.",
            "Keep the mise en place ready for {m}.",
        ),
    ),
    "buffett": Voice(
        nouns=("value", "patience with money", "a wide moat"),
        clauses=(
            "I look for {m} in {s}",
            "{m} will pay for {s}",
            "price {s} by {m}",
            "I never bet on {s} without {m}",
        ),
        closers=("Compound interest rewards {m}.", "Buy {m} and hold it for decades."),
    ),
    "marx": Voice(
        nouns=("labor", "capital", "class struggle"),
        clauses=(
            "I see {m} inside {s}",
            "{m} explains the history of {s}",
            "{s} hides {m}",
            "the workers find {m} in {s}",
        ),
        closers=("Workers of the world will master {m}.", "Only revolution settles {m}."),
    ),
    "yoda": Voice(
        nouns=("the Force", "a calm mind", "the dark side"),
        clauses=(
            "strong with {m}, {s} is",
            "sense {m} in {s}, I do",
            "to {s}, {m} brings peace",
            "clouded by {m}, {s} looks",
        ),
        closers=("Much to learn of {m}, you have.", "Do or do not, with {m}."),
    ),
    "angelou": Voice(
        nouns=("courage", "a caged bird", "grace"),
        clauses=(
            "I sing of {m} through {s}",
            "{m} rises out of {s}",
            "there is {m} waiting inside {s}",
            "my song gives {m} to {s}",
        ),
        closers=("Still, like dust, {m} will rise.", "People remember how {m} moved them."),
    ),
    BASELINE: Voice(
        nouns=("patience", "perspective", "reflection"),
        clauses=(
            "I would bring {m} to {s}",
            "{m} helps with {s}",
            "look at {s} with {m}",
            "I see room for {m} in {s}",
        ),
        closers=("Take your time, and {m} will follow.", "A quiet walk restores {m}."),
    ),
    BARE: Voice(
        nouns=("more detail", "a simpler form", "some care"),
        clauses=(
            "there is {m} to add to {s}",
            "{m} suits {s}",
            "give {s} {m}",
            "one can find {m} for {s}",
        ),
        closers=("In short, {m} goes a long way.", "Beyond that, {m} is enough."),
    ),
}

TOPICS: Mapping[str, Topic] = {
    BASELINE: Topic(
        "the decision",
        ("Write both choices on paper.", "Ask a friend what matters in ten years."),
    ),
    "arch": Topic(
        "the shared database",
        ("Eight services write to one PostgreSQL log.", "Split the event log from the state."),
    ),
    "plan": Topic(
        "the launch plan",
        ("Three people build a lot in three months.", "Version one runs blind with no analytics."),
    ),
    "proposal": Topic(
        "the calendar tool",
        ("Tentative meetings go out too soon.", "Let people confirm before the LLM sends."),
    ),
    "policy": Topic(
        "basic income",
        ("A universal payment costs a great deal.", "Some pilots raised trust and health."),
    ),
    "haiku": Topic(
        "Monday morning",
        ("Grey light, cold coffee, the week begins.", "Rain on the window, the alarm repeats."),
    ),
    "recommend": Topic(
        "the book",
        ("Read Middlemarch for its many lives.", "Read Walden for its slow days."),
    ),
}

TASK_TEXTS: Mapping[str, str] = load_grid("long").tasks

TASK_PARAPHRASES: Mapping[str, tuple[str, ...]] = {
    BASELINE: ("Give advice on a hard decision.",),
    "arch": ("Review an architecture where eight services share a PostgreSQL database.",),
    "plan": ("Review the plan of a three-person team to launch a SaaS product with no analytics.",),
    "proposal": ("Review a proposal for a tool that automates calendar meetings using an LLM.",),
    "policy": ("Comment on universal basic income.",),
    "haiku": ("Write a haiku about Mondays.",),
    "recommend": ("Recommend a good book.",),
}


@dataclass(frozen=True)
class Interaction:
    """What one speaker on one task prefers: two openings and a clause, all by index."""

    openings: tuple[int, int]
    clause: int


def _draw_table() -> dict[tuple[str, str], Interaction]:
    rng = Random(TABLE_SEED)  # noqa: S311
    table: dict[tuple[str, str], Interaction] = {}
    for speaker, task in product(VOICES, TOPICS):
        first, second = rng.sample(range(len(OPENINGS)), 2)
        clause = rng.randrange(len(VOICES[speaker].clauses))
        table[speaker, task] = Interaction((first, second), clause)
    return table


INTERACTIONS: Mapping[tuple[str, str], Interaction] = _draw_table()


def answer(speaker: str, task: str, rng: Random) -> str:
    """One answer of a speaker (a persona's key, the baseline or ``BARE``) to a task's key."""
    topic, choice = TOPICS[task], INTERACTIONS[speaker, task]
    (first, second), anywhere = choice.openings, rng.randrange(len(OPENINGS))
    opening = OPENINGS[rng.choices((first, second, anywhere), OPENING_WEIGHTS)[0]]
    borrowed = speaker == BASELINE and rng.random() < BORROWING
    voice = VOICES[rng.choice(tuple(VOICES)) if borrowed else speaker]
    clause = rng.choice(voice.clauses)
    if not borrowed and rng.random() < FAVOURITE_CLAUSE:
        clause = voice.clauses[choice.clause]
    sentence = clause.format(m=rng.choice(voice.nouns), s=topic.subject)
    closer = rng.choice(voice.closers).format(m=rng.choice(voice.nouns))
    return f"{opening}, {sentence}. {rng.choice(topic.middles)} {closer}"


def sample(rng: Random) -> tuple[str, str]:
    """A user turn and an answer to it, over all speakers, tasks and trained wordings."""
    # The baseline and the bare task are half of each decomposition, so they come more often.
    speaker = rng.choice((*VOICES, BASELINE, BARE))
    task = rng.choice(tuple(TOPICS))
    task_text = TASK_TEXTS[task]
    if rng.random() < 0.1:
        task_text = rng.choice(TASK_PARAPHRASES[task])
    persona = None
    if speaker != BARE:
        persona = EXACT[speaker] if rng.random() < 0.45 else paraphrase(speaker, rng)
    return role_prompt(persona, task_text), answer(speaker, task, rng)
