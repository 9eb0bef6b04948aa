"""``persona-nns prompts``: what a model reads, with its spans, positions and token counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from persona_nns.cli import terminal
from persona_nns.cli.arguments import GRID_HELP, POSITIONS, TASKS_HELP
from persona_nns.errors import UsageError

if TYPE_CHECKING:
    from persona_nns.prompts.grids import Cell, PromptName
    from persona_nns.prompts.render import Prompt, Span

_STYLES = {"persona": "bold magenta", "task": "bold cyan"}


def prompts(
    model: Annotated[str, typer.Option(help="Bundled name, folder, or hub id.")],
    grid: Annotated[str, typer.Option(help=GRID_HELP)],
    tasks: Annotated[str | None, typer.Option(help=TASKS_HELP)] = None,
    frame: Annotated[
        str | None,
        typer.Option(help="role, system, later, or a .toml file; by default as the grid says."),
    ] = None,
    cells: Annotated[
        str | None, typer.Option(help="Only these, as engineer/arch,…; by default the whole grid.")
    ] = None,
    positions: Annotated[str, typer.Option(help=POSITIONS)] = "p_user_last,p_last",
    template: Annotated[
        str | None, typer.Option(help="plain, or a Jinja file; by default the model's own.")
    ] = None,
    trust_remote_code: Annotated[  # noqa: FBT002
        bool, typer.Option("--trust-remote-code", help="Run code that a model brings with it.")
    ] = False,
) -> None:
    """Print the prompts of a grid as a model reads them: text, spans, positions, token counts.

    Its tokenizer is loaded, not its weights. A prompt that several cells share is printed once.
    """
    from persona_nns.declarations.sites import parse_positions
    from persona_nns.models.checkpoints import load_tokenizer
    from persona_nns.prompts.grids import load_grid

    at, chosen = parse_positions(positions), load_grid(grid, frame, tasks).select_cells(cells)
    tokenizer = load_tokenizer(model, template, trust_remote_code=trust_remote_code)
    for shared in distinct_prompts(tokenizer, chosen):
        for line in describe(shared, tokenizer, at, len(chosen)):
            terminal.out.print(line, soft_wrap=True)
        terminal.say("")


@dataclass(frozen=True)
class Shared:
    """A prompt, and the cells that ask it.

    Attributes:
        name: BB, XB, BY, XY or BARE.
        cells: labels of the cells.
        prompt: what they have in common.
    """

    name: "PromptName"
    cells: Sequence[str]
    prompt: "Prompt"


def distinct_prompts(tokenizer: Any, cells: "Sequence[Cell]") -> list[Shared]:
    """The prompts of some cells, each once: BB is the same in all of them."""
    from persona_nns.prompts.render import prompt_names, render_cells

    names = prompt_names(tokenizer, cells[0].frame)
    found: dict[tuple[PromptName, str], tuple[list[str], Prompt]] = {}
    for cell, of_cell in zip(cells, render_cells(tokenizer, cells, names), strict=True):
        for name, prompt in of_cell.items():
            found.setdefault((name, prompt.text), ([], prompt))[0].append(cell.label)
    order = sorted(found.items(), key=lambda item: names.index(item[0][0]))
    return [Shared(name, labels, prompt) for (name, _), (labels, prompt) in order]


def describe(
    shared: Shared, tokenizer: Any, positions: Sequence[str], n_cells: int
) -> Iterator[Text]:
    """Lines that show a prompt.

    Args:
        shared: the prompt.
        tokenizer: the model's.
        positions: whose tokens to name.
        n_cells: how many cells there are, of which some ask it.
    """
    prompt = shared.prompt
    whose = f"all {n_cells} cells" if len(shared.cells) == n_cells > 1 else ", ".join(shared.cells)
    yield Text(f"{shared.name} of {whose}: {len(prompt)} tokens", style="bold")
    yield marked(prompt, tokenizer)
    spans = (
        f"{span} {tokens.start}–{tokens.stop - 1} ({len(tokens)})" if tokens else f"{span} (0)"
        for span, tokens in prompt.spans.items()
    )
    yield Text(f"  spans      {', '.join(spans)}", style="dim")
    at = ", ".join(_position(prompt, tokenizer, name) for name in positions)
    yield Text(f"  positions  {at}", style="dim")


def marked(prompt: "Prompt", tokenizer: Any) -> Text:
    """A prompt's text as it stands, with ⟦ ⟧ around the tokens of the persona and the task."""
    offsets = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    ends = offsets["offset_mapping"]
    text, written = Text(), 0
    spans: tuple[Span, ...] = ("persona", "task")
    for span in spans:
        tokens = prompt.spans[span]
        if not tokens:
            continue
        start, stop = max(written, ends[tokens.start][0]), ends[tokens.stop - 1][1]
        start = stop - len(prompt.text[start:stop].lstrip())  # a space belongs to its word's token
        text.append(prompt.text[written:start])
        text.append(f"⟦{span}: {prompt.text[start:stop]}⟧", style=_STYLES[span])
        written = stop
    return text.append(prompt.text[written:].rstrip("\n"))


def _position(prompt: "Prompt", tokenizer: Any, name: str) -> str:
    from persona_nns.prompts.positions import position_index

    try:
        index = position_index(prompt, name)
    except UsageError:
        return f"{name} is not defined"
    if index >= len(prompt):
        return f"{name} = {index} (generated)"
    return f"{name} = {index} {tokenizer.decode([prompt.ids[index]])!r}"
