"""A question under a system prompt: its token ids, whether or not the model has a system role."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from persona_nns.errors import PersonaError
from persona_nns.prompts.templates import apply_template, find_shown, takes_system_role


@dataclass(frozen=True)
class Chat:
    """A rendered conversation with the generation header.

    Attributes:
        ids: its token ids.
        system_role: whether the template took a system role. Without one the system prompt, an
            empty line and the question are the user's turn.
    """

    ids: tuple[int, ...]
    system_role: bool


def render_chat(tokenizer: PreTrainedTokenizerBase, question: str, system: str = "") -> Chat:
    """Render a question, under a system prompt unless that is empty.

    Raises:
        UsageError: the model has no chat template.
        PersonaError: the template does not show the question as it is.
    """
    with_role = bool(system) and takes_system_role(tokenizer)
    if with_role:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    else:
        content = f"{system}\n\n{question}" if system else question
        messages = [{"role": "user", "content": content}]
    text = apply_template(tokenizer, messages, header=True)
    if find_shown(question, text)[0] < 0:
        raise PersonaError(
            f"The chat template does not show the question {question!r} as it is; pass one that "
            "does (--template FILE)."
        )
    return Chat(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), with_role)


def response_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> tuple[int, ...]:
    """Token ids of an answer, without an end-of-turn token."""
    return tuple(tokenizer(response, add_special_tokens=False)["input_ids"])
