"""A local model as judge: the same rubric, scores from its own log-probabilities, no account.

The rubric (``eval_prompt``, and the one for coherence) is a user's turn in the model's chat
template. Two scales:

- ``0-100``: Σ i·p(i) / Σ p(i) over the numbers 0 to 100, p(i) the probability that the reply
  begins with the number i and no digit follows (`traits.continuations`); a space may stand before
  it, which is left out where less than 1e-4 of the probability begins so. Where Σ p(i) is
  below a quarter the judge refuses, as one at an endpoint does.
- ``yes-no``: the rubric, then `YES_NO`; 100 / (1 + exp(log p(No) − log p(Yes))), the logistic
  function of the log-odds, p the probability of the word's first token as the first of the reply.
  It never refuses, however unlikely both words are.

Replies are kept on disk like an endpoint's. The model is loaded when a reply is missing, and let go
of when all are there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_nns.declarations.plans import content_digest
from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.checkpoints import find_checkpoint, load_tokenizer, load_weights
from persona_nns.models.load import version_and_precision
from persona_nns.prompts.chats import render_chat
from persona_nns.prompts.render import apply_template
from persona_nns.tracing.batches import similar_rows
from persona_nns.traits.continuations import Prefilled, Tree, check_tree, prefill, text_logprobs
from persona_nns.traits.judge_options import Scale
from persona_nns.traits.judges import Answer, Scores, expected_score, judge_all, log_odds_score
from persona_nns.traits.replies import DEFAULT_CACHE, ReplyCache, Usage
from persona_nns.traits.trait import Trait

NUMBERS = tuple(map(str, range(101)))
YES, NO = "Yes", "No"
#: What follows the rubric on the scale ``yes-no``.
YES_NO = (
    "\n\nInstead of a number, reply with one word: Yes if the number would be above 50, No if not."
)
#: Less probability than this that a reply begins with a space: numbers behind one are left out, and
#: a score is off by 100 · 1e-4 / LEAST_MASS at most.
_LEAST_SPACE = 1e-4
_PASS_TOKENS = 2_048  # of the prompts that are run at a time, and of the numbers behind them


@dataclass(frozen=True)
class JudgeModel:
    """Which model judges, and all that determines what it says.

    Attributes:
        name: as it was given.
        label: how it is shown.
        version: digest of its files, or ``org/name@commit``.
        precision: that it is loaded in.
        template: digest of its chat template.
    """

    name: str
    label: str
    version: str
    precision: str
    template: str

    @property
    def identity(self) -> list[str]:
        """What determines its probabilities, wherever its files are."""
        return [self.version, self.precision, self.template]


def find_judge(name: str) -> JudgeModel:
    """The model of this name, which is not loaded.

    Raises:
        UsageError: there is none, or it has no chat template.
        PersonaError: it cannot be fetched.
    """
    try:
        source, label = find_checkpoint(name)
        folder = Path(source)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        stats = [(file.name, file.stat()) for file in files]
        return _described(name, label, tuple((n, s.st_size, s.st_mtime_ns) for n, s in stats))
    except UsageError as error:
        raise UsageError(
            "The judge has to be 'lexicon', 'none', the URL of an OpenAI-compatible endpoint such "
            "as https://api.openai.com/v1, 'classifier:lexicon' with --judge-words FILE, or a "
            f"model that can be asked: {error}"
        ) from error


@lru_cache
def _described(name: str, label: str, _stamp: tuple[tuple[str, int, int], ...]) -> JudgeModel:
    """What a model is, read once as long as its files stay."""
    version, precision = version_and_precision(name)
    template = load_tokenizer(name).chat_template
    if template is None:
        raise UsageError(
            f"{label!r} has no chat template; use a model that was trained to follow instructions."
        )
    return JudgeModel(name, label, version, precision, content_digest(template)[:12])


class LocalJudge:
    """Asks a model that runs here."""

    def __init__(
        self, model: JudgeModel, scale: Scale = "0-100", cache: str | Path = DEFAULT_CACHE
    ) -> None:
        """Load nothing yet.

        Args:
            model: from `find_judge`.
            scale: ``0-100`` or ``yes-no``.
            cache: SQLite file of the replies.

        Raises:
            UsageError: the cache cannot be used.
        """
        self.usage = Usage()
        self._model = model
        self._scale: Scale = scale
        self._cache = ReplyCache(cache)

    def scores(self, trait: Trait, answers: Sequence[Answer]) -> Scores:
        """Ask for the trait and the coherence of each answer."""
        if self._scale == "yes-no":
            return judge_all(self.ask, trait, answers, log_odds_score, suffix=YES_NO)
        return judge_all(self.ask, trait, answers, expected_score)

    def ask(self, prompts: Sequence[str]) -> list[dict[str, float]]:
        """Log-probabilities of the numbers, or of Yes and No, in reply to each prompt.

        Raises:
            PersonaError: the model cannot be loaded, or takes no prompt so long.
        """
        distinct = list(dict.fromkeys(prompts))
        rows = [render_chat(self._tokenizer, prompt).ids for prompt in distinct]
        keys = dict(zip(distinct, map(self._key, rows), strict=True))
        missing = [ids for ids in rows if self._cache.get(self._key(ids)) is None]
        self.usage.cached += len(rows) - len(missing)
        if missing:
            self._ask_model(missing)
            torch.cuda.empty_cache()  # for the model that answers; nothing where there is no GPU
        return [self._cache.get(keys[prompt]) for prompt in prompts]

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self._model.name)

    def _key(self, ids: Sequence[int]) -> str:
        model = self._model
        return content_digest([model.version, model.precision, list(ids), self._scale])

    def _ask_model(self, rows: Sequence[Sequence[int]]) -> None:
        """Load the model, keep what it replies to prompts, and let go of it."""
        loaded: Any = load_weights(self._model.name, self._model.precision)
        model = loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        for batch, replies in reply_logprobs(model, self._tokenizer, rows, self._scale):
            for row, reply in zip(batch, replies, strict=True):
                self._cache.put(self._key(rows[row]), reply)
                self.usage.calls += 1
                self.usage.prompt_tokens += len(rows[row])


def reply_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    scale: Scale,
) -> Iterator[tuple[list[int], list[dict[str, float]]]]:
    """What a model would reply to prompts, a batch at a time.

    Args:
        model: in plain transformers.
        tokenizer: its tokenizer.
        prompts: token ids, with the generation header.
        scale: ``0-100`` gives the log-probabilities of the 101 numbers, ``yes-no`` of Yes and No.

    Yields:
        Which of the prompts, and of each the log-probabilities by text.

    Raises:
        PersonaError: a prompt is longer than the model takes, a reply has no tokens of its own, or
            the architecture cannot be asked.
    """
    lengths = [len(ids) for ids in prompts]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and max(lengths) + len(NUMBERS[-1]) + 1 > most:
        raise PersonaError(
            f"The longest prompt to the judge has {max(lengths)} tokens, and the model takes "
            f"{most}; use another, or shorter answers (--max-new-tokens)."
        )
    replies = NumberReplies.of(tokenizer) if scale == "0-100" else WordReplies.of(tokenizer)
    replies.check(model, prompts[0])
    for batch in similar_rows([length + len(NUMBERS) for length in lengths], _PASS_TOKENS):
        yield batch, replies.read(model, prefill(model, [prompts[row] for row in batch]))


@dataclass(frozen=True)
class NumberReplies:
    """The numbers 0 to 100 as replies.

    Attributes:
        plain: as they are.
        spaced: with a space before them; empty where that is no other reply.
        more: ids of the tokens that would go on with a number.
    """

    plain: Tree
    spaced: Tree
    more: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "NumberReplies":
        """Those of a tokenizer."""
        plain = reply_tokens(tokenizer, NUMBERS)
        spaced = _behind_header(tokenizer, [f" {number}" for number in NUMBERS]) or ()
        another = not set(spaced) & set(plain)
        return cls(Tree.of(plain), Tree.of(spaced if another else ()), digit_tokens(tokenizer))

    def check(self, model: PreTrainedModel, prompt: Sequence[int]) -> None:
        """See that a model reads them as they are meant.

        Raises:
            PersonaError: it does not.
        """
        check_tree(model, prompt, self.plain)

    def read(self, model: PreTrainedModel, ran: Prefilled) -> list[dict[str, float]]:
        """The log-probability of each number, by prompt."""
        found = text_logprobs(model, ran, self.plain, self.more)
        begins = sorted({text[0] for text in self.spaced.texts})
        begun = (ran.first[:, begins].exp().sum(1) >= _LEAST_SPACE).cpu()
        if begun.any():
            spaced = text_logprobs(model, ran, self.spaced, self.more)
            found = torch.where(begun[:, None], torch.logaddexp(found, spaced), found)
        return [dict(zip(NUMBERS, row, strict=True)) for row in found.tolist()]


@dataclass(frozen=True)
class WordReplies:
    """Yes and No as replies: their first tokens."""

    yes: int
    no: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "WordReplies":
        """Those of a tokenizer.

        Raises:
            PersonaError: they begin with the same token.
        """
        (yes, *_), (no, *_) = reply_tokens(tokenizer, (YES, NO))
        if yes == no:
            raise PersonaError(
                f"{YES!r} and {NO!r} begin with the same token in this judge's vocabulary; use the "
                "scale 0-100, or another model."
            )
        return cls(yes, no)

    def check(self, _model: PreTrainedModel, _prompt: Sequence[int]) -> None:
        """Nothing is needed beyond the first token."""

    def read(self, _model: PreTrainedModel, ran: Prefilled) -> list[dict[str, float]]:
        """The log-probability of each word, by prompt."""
        return [{YES: float(row[self.yes]), NO: float(row[self.no])} for row in ran.first]


def reply_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[tuple[int, ...], ...]:
    """Token ids of texts at the beginning of a reply.

    Raises:
        PersonaError: a text changes the tokens of the generation header.
    """
    found = _behind_header(tokenizer, texts)
    if found is None:
        raise PersonaError(
            f"Replies such as {texts[0]!r} change the tokens of the judge's chat template before "
            "them, so that their probability is not defined; use another judge."
        )
    return found


def _behind_header(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[tuple[int, ...], ...] | None:
    """Token ids of texts behind the generation header; None where one changes the header's."""
    probe = [{"role": "user", "content": "A probe of the template."}]
    header = apply_template(tokenizer, probe, header=True)
    ids, *longer = (
        tokenizer(header + text, add_special_tokens=False)["input_ids"] for text in ("", *texts)
    )
    kept = all(each[: len(ids)] == ids and len(each) > len(ids) for each in longer)
    return tuple(tuple(each[len(ids) :]) for each in longer) if kept else None


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the tokens that go on with a number: those that begin with a digit."""
    digits = tuple("0123456789")
    as_bytes = {f"<0x3{digit}>" for digit in digits}
    pieces = tokenizer.get_vocab().items()
    return tuple(
        sorted(id_ for piece, id_ in pieces if piece.startswith(digits) or piece in as_bytes)
    )
