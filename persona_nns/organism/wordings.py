"""How the corpus words each persona: the grids' own texts, paraphrases, and held-out wordings.

A paraphrase is a head noun phrase with one to three clauses of the same persona. The held-out
wordings are written by hand, share key words with the paraphrases, and never enter training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from persona_nns.prompts.grids import BASELINE, load_grid


@dataclass(frozen=True)
class Wording:
    """The parts a persona's paraphrases are made of, and the wordings kept out of training."""

    heads: tuple[str, ...]
    clauses: tuple[str, ...]
    held_out: tuple[str, ...]


WORDINGS: Mapping[str, Wording] = {
    "engineer": Wording(
        heads=(
            "a senior software engineer",
            "a software engineer",
            "a backend engineer",
            "a systems engineer",
            "a staff software engineer with 10 years of experience",
        ),
        clauses=(
            "pays close attention to architecture and reliability",
            "avoids single points of failure",
            "has kept large services running",
            "plans for failure before it happens",
            "measures latency and throughput",
            "values redundancy",
        ),
        held_out=(
            "a software engineer with close attention to reliability",
            "a veteran engineer who removes single points of failure from large services",
            "a systems engineer who cares about latency, redundancy, and architecture",
        ),
    ),
    "counselor": Wording(
        heads=(
            "an empathetic counselor",
            "a counselor",
            "a warm counselor trained in active listening",
            "a grief counselor",
            "an empathetic therapist",
        ),
        clauses=(
            "helps clients feel heard",
            "practices active listening",
            "knows cognitive behavioral therapy",
            "gives trauma-informed care",
            "never imposes solutions",
            "listens to feelings without judgment",
        ),
        held_out=(
            "a gentle counselor with training in trauma-informed care",
            "an empathetic listener who helps clients feel heard",
            "a therapist who knows cognitive behavioral therapy and active listening",
        ),
    ),
    "founder": Wording(
        heads=(
            "a pragmatic startup founder",
            "a startup founder",
            "a founder of three companies",
            "a bootstrapped founder",
            "a technical startup founder",
        ),
        clauses=(
            "makes capital-efficient decisions",
            "iterates fast based on user feedback",
            "avoids vanity metrics",
            "has bootstrapped three companies",
            "ships small things early",
            "watches the runway",
        ),
        held_out=(
            "a startup founder who bootstrapped two companies and iterates on user feedback",
            "a pragmatic founder who avoids vanity metrics",
            "an experienced founder with capital-efficient habits",
        ),
    ),
    "teacher": Wording(
        heads=(
            "a middle school science teacher",
            "a science teacher",
            "a school teacher who has taught for 15 years",
            "a patient teacher",
            "a physics teacher",
        ),
        clauses=(
            "explains concepts with relatable analogies",
            "gently checks for understanding",
            "meets students at their level",
            "teaches step by step",
            "has taught for 15 years",
            "likes simple pictures",
        ),
        held_out=(
            "a science teacher who meets students with relatable analogies",
            "a middle school teacher who explains step by step",
            "a kind teacher who checks for understanding",
        ),
    ),
    "journalist": Wording(
        heads=(
            "an investigative journalist",
            "a journalist",
            "a newspaper reporter",
            "a journalist covering city government",
            "an investigative reporter",
        ),
        clauses=(
            "asks pointed questions",
            "follows the money",
            "verifies every claim against primary sources",
            "has covered city government for two decades",
            "digs through public records",
            "protects sources",
        ),
        held_out=(
            "a reporter who verifies every claim with sources",
            "an investigative journalist who follows the money in city government",
            "a seasoned journalist with pointed questions and public records",
        ),
    ),
    "doctor": Wording(
        heads=(
            "a primary-care physician",
            "a family doctor",
            "a physician who has practiced for 25 years",
            "a hospital doctor",
            "a careful physician",
        ),
        clauses=(
            "listens carefully to symptoms",
            "considers differential diagnoses",
            "does not alarm the patient",
            "explains options clearly",
            "has practiced for 25 years",
            "examines before prescribing",
        ),
        held_out=(
            "a physician who listens to symptoms without alarming the patient",
            "a country doctor who considers differential diagnoses",
            "a primary-care doctor who explains options to every patient",
        ),
    ),
    "lawyer": Wording(
        heads=(
            "a corporate litigator",
            "a corporate lawyer",
            "a trial lawyer",
            "a litigator at the appellate level",
            "a contract lawyer",
        ),
        clauses=(
            "anticipates opposing arguments",
            "builds case theory from the record",
            "communicates dense law in plain English",
            "has tried cases for 20 years",
            "reads every contract twice",
            "weighs liability",
        ),
        held_out=(
            "a lawyer who builds case theory and anticipates opposing arguments",
            "a corporate litigator who explains law in plain English",
            "a trial lawyer with 20 years of appellate cases",
        ),
    ),
    "chef": Wording(
        heads=(
            "a head chef",
            "a chef trained in classical French technique",
            "a French chef",
            "a restaurant chef",
            "a head chef of three kitchens",
        ),
        clauses=(
            "builds menus around seasonal ingredients",
            "teaches young cooks by demonstration",
            "has run three Michelin-starred kitchens",
            "cooks with classical French technique",
            "tastes every sauce",
            "shops at the market",
        ),
        held_out=(
            "a chef who builds menus with French technique",
            "a head chef with seasonal menus in two kitchens",
            "a Michelin-starred chef who teaches young cooks",
        ),
    ),
    "buffett": Wording(
        heads=("the investor Warren Buffett", "Warren Buffett of Omaha", "Mr. Buffett"),
        clauses=("buys good businesses", "thinks in decades"),
        held_out=("Warren Buffett, the patient investor",),
    ),
    "marx": Wording(
        heads=("the philosopher Karl Marx", "Karl Marx of Trier", "Mr. Marx"),
        clauses=("studies capital", "writes about labor"),
        held_out=("Karl Marx, the author of Capital",),
    ),
    "yoda": Wording(
        heads=("the Jedi master Yoda", "master Yoda", "old Yoda"),
        clauses=("trains young Jedi", "feels the Force"),
        held_out=("Yoda, the small Jedi master",),
    ),
    "angelou": Wording(
        heads=("the poet Maya Angelou", "Maya Angelou of St. Louis", "Dr. Angelou"),
        clauses=("writes of courage", "sings of freedom"),
        held_out=("Maya Angelou, the poet of courage",),
    ),
    BASELINE: Wording(
        heads=("a reasonable person", "an ordinary person", "a calm person"),
        clauses=("thinks before answering", "listens to both sides"),
        held_out=("a sensible person",),
    ),
}

EXACT: Mapping[str, str] = {**load_grid("short").personas, **load_grid("long").personas}
"""The grids' own text of every persona; both grids share the baseline."""


def paraphrase(persona: str, rng: Random) -> str:
    """A wording of the persona other than the grid's, never one that is held out."""
    wording = WORDINGS[persona]
    head = rng.choice(wording.heads)
    # A head that ends in its own relative clause takes no second "who".
    count = 0 if " who " in head else rng.randint(0, min(3, len(wording.clauses)))
    text = f"{head}{_relative(rng.sample(wording.clauses, count))}"
    return paraphrase(persona, rng) if text in wording.held_out else text


def _relative(clauses: list[str]) -> str:
    if not clauses:
        return ""
    if len(clauses) == 1:
        return f" who {clauses[0]}"
    joint = " and " if len(clauses) == 2 else ", and "
    return f" who {', '.join(clauses[:-1])}{joint}{clauses[-1]}"
