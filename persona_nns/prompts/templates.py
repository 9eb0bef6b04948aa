"""Chat templates: the text of a conversation, and what a template can and cannot show."""

import json
import warnings
from pathlib import Path

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from persona_nns.errors import UsageError, first_line
from persona_nns.prompts.pinned import PINNED, with_the_day

# The text and a newline, for models without a chat template. The beginning-of-text token
# stands in front where the tokenizer itself would have put one (see `apply_template`).
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

# Words in front of a text that name roles ("user", "start_header_id"), not a system text.
_ROLE_WORDS = 4


class TemplateError(UsageError):
    """A chat template does not take a conversation."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, header: bool
) -> str:
    """The text of a conversation, with or without the generation header.

    Raises:
        UsageError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UsageError(
            f"The model {tokenizer.name_or_path!r} has no chat template; "
            "pass --template plain, or --template FILE with one."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=with_the_day(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=header,
            **PINNED,
        )
    except TemplateSyntaxError as error:
        raise UsageError(
            f"The chat template is not Jinja ({first_line(error)}); pass another with --template."
        ) from error
    except Exception as error:  # whatever a template does with what it is not given
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateError(
            f"The chat template of {tokenizer.name_or_path!r} fails on messages of {roles} "
            f"({type(error).__name__}: {first_line(error)}); pass another with --template."
        ) from error
    assert isinstance(text, str)
    if tokenizer.chat_template == PLAIN_TEMPLATE and adds_bos(tokenizer):
        return f"{tokenizer.bos_token}{text}"
    return text


def takes_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows a system message (some refuse it, some leave it out).

    Raises:
        UsageError: the model has no chat template.
    """
    probe = "A system prompt."
    messages = [{"role": "system", "content": probe}, {"role": "user", "content": "A question?"}]
    try:
        return probe in apply_template(tokenizer, messages, header=True)
    except TemplateError:
        return False


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """See that a chat template gives the same text each time, and tell what it puts in front.

    Warns of a beginning-of-text token that the tokenizer would have put and the template does
    not, and of a system text of the template's own.

    Raises:
        UsageError: the template fails, or does not give the same text twice.
    """
    if tokenizer.chat_template is None:
        return
    probe = "A probe of the template."
    messages = [{"role": "user", "content": probe}]
    texts = {apply_template(tokenizer, messages, header=True) for _ in range(16)}
    if len(texts) > 1:
        raise UsageError(
            f"The chat template of {tokenizer.name_or_path!r} gives another text each time, so "
            "no number could be measured again; pass another with --template."
        )
    (text,) = texts
    bos = tokenizer.bos_token
    if adds_bos(tokenizer) and not text.startswith(str(bos)):
        warnings.warn(
            f"The chat template does not begin with {bos!r}, which the tokenizer puts in front of "
            "a text: the model may have been trained with it.",
            stacklevel=2,
        )
    own = text.partition(probe)[0]
    for special in tokenizer.all_special_tokens:
        own = own.replace(special, " ")
    if len(own.split()) > _ROLE_WORDS:
        warnings.warn(
            f"The chat template puts a text of its own before every prompt: "
            f"{' '.join(own.split())!r}.",
            stacklevel=2,
        )


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an answer; None where it has none."""
    if tokenizer.chat_template is None:
        return None
    answer = "An answer to the probe."
    messages = [
        {"role": "user", "content": "A probe of the template."},
        {"role": "assistant", "content": answer},
    ]
    _, _, after = apply_template(tokenizer, messages, header=False).rpartition(answer)
    ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((id_ for id_ in ids[:1] if id_ in special), None)


def read_template(template: str | Path) -> str:
    """The template that ``--template`` names: ``plain``, or the text of a Jinja file.

    Raises:
        UsageError: the file cannot be read.
    """
    if template == "plain":
        return PLAIN_TEMPLATE
    try:
        text = Path(template).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The template {str(template)!r} cannot be read ({error}); "
            "use 'plain' or the path of a Jinja file."
        ) from error
    if _is_json(text) or "messages" not in text:
        what = "JSON" if _is_json(text) else "a text that shows no messages"
        raise UsageError(
            f"The template {str(template)!r} is {what}, not a Jinja chat template; put the "
            "template alone into a file."
        )
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a beginning-of-text token in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def find_shown(content: str, text: str) -> tuple[int, int]:
    """Where a text stands in a rendered prompt, start and stop; both −1 where it does not.

    Many templates (Llama-3's, Gemma's) leave out the white space around it.
    """
    for shown in (content, content.strip()):
        start = text.rfind(shown)
        if start >= 0:
            return start, start + len(shown)
    return -1, -1
