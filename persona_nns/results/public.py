"""What results say of the machine that made them, and what is left of it for everybody.

Numbers, texts, prompts, versions and identities are the results and stay. The machine's name, the
process, the folders in which files lay, and what a URL holds beside its address are nobody's
business, and a key may be among the last.
"""

import re
from collections.abc import Mapping
from typing import Any

# What a note of a session says of its machine.
_OF_THE_MACHINE = ("host", "process")
# What was asked of models: a prompt that looks like a path is a prompt.
_CONTENT = ("personas", "tasks", "markers", "template", "frame", "inputs", "systems", "units")
_PATH = re.compile(r"(?:file://)?(?:~[^/\\]*|[A-Za-z]:)?[/\\].*", re.DOTALL)
_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^/?#\s]*@)?([^?#\s]*)(?:[?#]\S*)?", re.IGNORECASE)


def for_everybody(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a run, or of a session's note, as they may leave this machine.

    Args:
        attrs: JSON-able values.

    Returns:
        The same without the machine's name and process; of paths that begin at the root or at
        somebody's home, their last part (``/home/anna/v.pt`` is ``v.pt``); of URLs, neither user
        nor password nor query.
    """
    return {
        name: value if name in _CONTENT else _plain(value)
        for name, value in attrs.items()
        if name not in _OF_THE_MACHINE
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if not isinstance(value, str):
        return value
    if _PATH.fullmatch(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return _URL.sub(r"\1\2", value)
