"""Where a position stands in a prompt."""

from collections.abc import Iterable, Mapping, Sequence

from persona_nns.declarations.sites import match_position
from persona_nns.errors import UsageError
from persona_nns.prompts.grids import PromptName
from persona_nns.prompts.render import Prompt


def position_index(prompt: Prompt, position: str) -> int:
    """Index of a position in the tokens of a prompt followed by its continuation.

    Raises:
        UsageError: the prompt has no such position.
    """
    match = match_position(position)
    if position == "p_user_last":
        if prompt.user_last is None:
            raise UsageError(
                "The chat template renders the user turn differently without the generation "
                "header, so p_user_last is not defined; use p_last or p_last-1, p_last-2, …"
            )
        return prompt.user_last
    index = len(prompt) - 1 - int(match["back"] or 0) + int(match["generated"] or 0)
    if index < 0:
        raise UsageError(
            f"A prompt of {len(prompt)} tokens has no position {position!r}; "
            "ask for one nearer to its end."
        )
    return index


def tokens_from_first_site(
    cells: Iterable[Mapping[PromptName, Prompt]], positions: Sequence[str]
) -> int:
    """How many tokens at the end of the prompts have to be run for every site to be among them."""
    return max(
        max(1, len(prompt) - position_index(prompt, position))
        for prompts in cells
        for prompt in prompts.values()
        for position in positions
    )
