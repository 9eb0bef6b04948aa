"""The source of functions that are defined in a cell under ``%%time``.

IPython compiles the rest of such a cell itself and keeps the lines nowhere, so that neither Python
nor nnsight finds the source of a function in it. What was typed is in IPython's history.
"""

import ast
import sys
import types
from collections.abc import Iterator
from typing import Any


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code, and those inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from codes_in(inner)


def find_source(function: types.FunctionType) -> None:
    """Have a function's source found, where it was typed into a cell under a magic word."""
    ipython = sys.modules.get("IPython")
    shell: Any = None if ipython is None else ipython.get_ipython()
    for typed in _under_magic(shell):
        body = shell.transform_cell(typed)
        file = shell.compile.cache(body, shell.execution_count)
        compiled = shell.compile(ast.parse(body), file, "exec")
        # Two codes are equal whatever file they are of.
        for code in codes_in(compiled):
            if code == function.__code__:
                function.__code__ = code
                return


def _under_magic(shell: Any) -> Iterator[str]:
    """What stood in cells below a magic word, the last cell first."""
    for cell in reversed([] if shell is None else shell.user_ns["In"]):
        try:
            statements = ast.parse(cell).body
        except SyntaxError:
            continue
        for each in statements:
            if not isinstance(each, ast.Expr) or not isinstance(call := each.value, ast.Call):
                continue
            if isinstance(call.func, ast.Attribute) and call.func.attr == "run_cell_magic":
                yield ast.literal_eval(call.args[2])
