"""Which judge is meant: the options of every experiment whose answers are judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

from transformers import PreTrainedTokenizerBase

from persona_nns.declarations.options import FileName, NamesFile
from persona_nns.declarations.plans import content_digest
from persona_nns.errors import UsageError, missing_extra
from persona_nns.traits.judges import Judge, LexiconJudge, check_lexicon, check_url
from persona_nns.traits.word_judge import WordJudge, read_words, words_of

if TYPE_CHECKING:
    from persona_nns.traits.local_judge import JudgeModel

Kind = Literal["none", "lexicon", "classifier:lexicon", "endpoint", "model"]
Scale = Literal["0-100", "yes-no"]
#: Words of one's own (`traits.word_judge`).
WORDS: Literal["classifier:lexicon"] = "classifier:lexicon"
#: Judges that have a name.
NAMED: tuple[Kind, ...] = ("none", "lexicon", WORDS)


@dataclass(frozen=True)
class JudgeOptions:
    """Who judges.

    Attributes:
        judge: lexicon; classifier:lexicon (words of your own); none; a URL (http://…) of an
            OpenAI-compatible endpoint; or a model that judges here: a bundled or fetched name, a
            folder, a .gguf file, or a hub id (org/name).
        judge_model: the model at an endpoint; its key is read from OPENAI_API_KEY.
        judge_prices: dollars for a million tokens sent and received, as 0.40,1.60.
        scale: how a model judges here: by numbers from 0-100, or by the log-odds of yes-no.
        judge_words: a .toml or .json file with a list of words for each trait, for
            classifier:lexicon.
    """

    judge: Annotated[str, NamesFile(NAMED)] = "lexicon"
    judge_model: str = "gpt-4.1-mini"
    judge_prices: str = ""
    scale: Scale = "0-100"
    judge_words: FileName | None = None

    @property
    def kind(self) -> Kind:
        """What kind of judge it is."""
        for named in NAMED:
            if self.judge == named:
                return named
        return "endpoint" if "://" in self.judge else "model"

    @property
    def identity(self) -> list[str]:
        """What determines the scores."""
        if self.kind == "model":
            from persona_nns.traits.local_judge import find_judge

            return ["model", *find_judge(self.judge).identity, self.scale]
        if self.kind == WORDS:
            return [self.judge, content_digest(read_words(self.words_file))]
        return [self.judge, self.judge_model] if self.kind == "endpoint" else [self.judge]

    @property
    def unverifiable(self) -> str:
        """Why `verify` must not ask this judge again; empty where it may."""
        if self.kind != "endpoint":
            return ""
        return f"its answers were judged at {self.judge}, which may cost money"

    def check(
        self,
        trait: str,
        questions: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """See that this judge can judge a trait.

        Args:
            trait: its name.
            questions: that are answered.
            tokenizer: of the model that answers.

        Raises:
            UsageError: it cannot, or is none.
        """
        if self.scale != "0-100" and self.kind != "model":
            raise UsageError(
                f"The scale {self.scale!r} is one of a model that judges here, not of "
                f"{self.judge!r}; leave out --scale, or name a model (--judge MODEL)."
            )
        if self.judge_words is not None and self.kind != WORDS:
            raise UsageError(
                f"The words {self.judge_words!r} are for --judge {WORDS}, not for {self.judge!r}."
            )
        if self.kind == "lexicon":
            check_lexicon(trait, questions, tokenizer)
        elif self.kind == WORDS:
            words_of(trait, self.words_file)
        elif self.kind == "endpoint":
            self._check_endpoint()
        elif self.kind == "model":
            from persona_nns.traits.local_judge import find_judge

            find_judge(self.judge)

    @property
    def words_file(self) -> str:
        """The file with the words of classifier:lexicon.

        Raises:
            UsageError: none was given.
        """
        if self.judge_words is None:
            raise UsageError(
                f"The judge {WORDS} needs a file with a list of words for each trait "
                "(--judge-words FILE)."
            )
        return self.judge_words

    def _check_endpoint(self) -> None:
        check_url(self.judge)
        self.price_pair()
        if not self.judge_model:
            raise UsageError("The judge needs the name of its model (--judge-model).")
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise missing_extra("A judge behind an endpoint needs openai", "judge") from error

    def price_pair(self) -> tuple[float, float] | None:
        """The prices as numbers; None where they are unknown.

        Raises:
            UsageError: they are not two numbers.
        """
        if not self.judge_prices:
            return None
        try:
            sent, received = map(float, self.judge_prices.split(","))
        except ValueError as error:
            raise UsageError(
                f"The judge's prices {self.judge_prices!r} are not two numbers such as 0.40,1.60."
            ) from error
        return sent, received


def open_judge(choice: JudgeOptions) -> Judge:
    """The judge of a choice; the same one for the same choice, so that it can sum its cost.

    Raises:
        UsageError: there is none.
    """
    if choice.kind == "lexicon":
        return LexiconJudge()
    if choice.kind == WORDS:
        return WordJudge(choice.words_file)
    if choice.kind == "model":
        from persona_nns.traits.local_judge import find_judge

        return _local_judge(find_judge(choice.judge), choice.scale)
    return _endpoint_judge(choice.judge, choice.judge_model)


@cache
def _local_judge(model: "JudgeModel", scale: Scale) -> Judge:
    from persona_nns.traits.local_judge import LocalJudge

    return LocalJudge(model, scale)


@cache
def _endpoint_judge(url: str, model: str) -> Judge:
    from persona_nns.traits.endpoint import EndpointJudge

    return EndpointJudge(url, model)
