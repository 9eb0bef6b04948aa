"""Where a rendered text shows what stood in the slots of a frame.

The same messages are rendered once more with marks in the slots. That tells what the template puts
around them, so that it does not matter whether a text stands elsewhere in the prompt too.
"""

from dataclasses import dataclass
from itertools import product

#: What stands in the slots while it is looked where a template shows them.
PERSONA_MARK, TASK_MARK = "persona0417mark", "task0417mark"


@dataclass(frozen=True)
class Slots:
    """The characters of a rendered text at which persona and task begin and end."""

    persona_start: int
    persona_stop: int
    task_stop: int


def find_slots(marked: str, text: str, persona: str, task: str) -> Slots | None:
    """The slots of a rendered text; None where the template does not show it as it is.

    Many templates (Llama-3's, Gemma's) leave out the white space around a message. Where one shows
    a message several times, the last one counts.

    Args:
        marked: the text with `PERSONA_MARK` and `TASK_MARK` in place of persona and task.
        text: the text itself.
        persona: what stands in the place of its mark; the mark may stand for no text.
        task: what stands in the place of its mark.
    """
    before, task_mark, after = marked.rpartition(TASK_MARK)
    head, persona_mark, between = before.rpartition(PERSONA_MARK)
    if not (task_mark and persona_mark):
        return None
    for shown in product(_as_shown(persona), _as_shown(task)):
        filled = [_fill(part, *shown) for part in (head, between, after)]
        pieces = [filled[0], shown[0], filled[1], shown[1], filled[2]]
        if "".join(pieces) == text:
            start = len(pieces[0])
            stop = start + len(pieces[1])
            return Slots(start, stop, stop + len(pieces[2]) + len(pieces[3]))
    return None


def _as_shown(text: str) -> list[str]:
    """A text, and the forms of it that a template may show at the edge of a message."""
    return list(dict.fromkeys([text, text.rstrip(), text.lstrip(), text.strip()]))


def _fill(part: str, persona: str, task: str) -> str:
    return part.replace(PERSONA_MARK, persona).replace(TASK_MARK, task)
