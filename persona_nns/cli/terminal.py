"""What a person reads: results on stdout, an error or a warning as one sentence on stderr."""

import sys
import traceback
from typing import Any

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Print a line as it is: names and paths may look like markup, and are not to be broken."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def fail(message: str, *, debug: bool, code: int) -> None:
    """Print what went wrong, with the traceback if asked, and end with an exit code."""
    if debug:
        traceback.print_exc()
    err.print(f"[bold red]error:[/bold red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning; takes the place of `warnings.showwarning`."""
    err.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)
