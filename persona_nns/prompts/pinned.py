"""What chat templates ask for that is not in the conversation: the same on every day.

Templates that print today's date or open a thinking block would make token ids depend on the day
or on a default. Both are pinned; templates that know neither ignore them.
"""

from datetime import datetime
from typing import Any

_DAY = datetime(2024, 7, 26)
_DIRECTIVES = "aAbBcdGHIjmMpSuUVwWxXyYf"

#: Arguments of every rendering: Llama's templates print ``date_string``.
PINNED: dict[str, Any] = {
    "date_string": f"{_DAY:%d %b %Y}",
    "enable_thinking": False,
    "directives_of_the_day": {
        **{f"%-{each}": f"{_DAY:%{each}}".lstrip("0") or "0" for each in "dHIjmMSUVWy"},
        **{f"%{each}": f"{_DAY:%{each}}" for each in _DIRECTIVES},
    },
}

# Functions cannot be passed to a template, which may define them.
_STRFTIME_NOW = """\
{%- macro strftime_now(format) -%}
{%- set day = namespace(text=format) -%}
{%- for directive, text in directives_of_the_day.items() -%}
{%- set day.text = day.text.replace(directive, text) -%}
{%- endfor -%}
{{- day.text -}}
{%- endmacro %}
"""


def with_the_day(template: str) -> str:
    """A template whose ``strftime_now`` tells the pinned day, and that is otherwise the same.

    The line that the function ends on is left out by the rendering, so the template's own first
    line stays its first.
    """
    return _STRFTIME_NOW + template if "strftime_now" in template else template
