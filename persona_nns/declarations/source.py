"""Which code an experiment's numbers come from, told from its source.

Of a file without a ``protocol_version``, what determines the numbers is part of a run's identity:
the code of `measure`, `plan`, `prepare` and `finish`, the declared dimensions and kinds, and all
that these use, in the file and in the modules of one's own that it imports. Comments, docstrings,
long names, units, descriptions and figures are not. What cannot be told apart counts: a statement
at the top of a file that binds no name, a module that is imported whole.
"""

import ast
import hashlib
import linecache
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import cache_from_source
from pathlib import Path
from typing import TypeVar

#: What an experiment's file defines that the numbers depend on.
ROOTS = ("variables", "measure", "plan", "prepare", "finish")
Tree = TypeVar("Tree", bound=ast.AST)
# Arguments of a Variable that say how it is called.
_WORDS = ("long_name", "units", "description")
#: Of a module: all that it binds.
EVERYTHING = "*"
_NOTHING = ""  # of a module: what it does beside binding names


@dataclass(frozen=True)
class Source:
    """A Python file of one's own.

    Attributes:
        file: where it is.
        name: as it is imported; empty for the experiment's own file.
    """

    file: Path
    name: str = ""

    @cached_property
    def content(self) -> bytes:
        """The file as it is now."""
        return self.file.read_bytes()

    @cached_property
    def statements(self) -> list[ast.stmt]:
        """Its statements without docstrings and words."""
        return strip(ast.parse(self.content)).body

    def binding(self, name: str) -> list[int]:
        """The statements that a name needs, by index; those that bind nothing always count."""
        return [
            index
            for index, statement in enumerate(self.statements)
            if name == EVERYTHING or not (bound := _bound(statement)) or name in bound
        ]


@dataclass
class Code:
    """The statements that an experiment's numbers depend on, and the files that they stand in.

    Attributes:
        file: the experiment's, or another of one's own.
        roots: names in it that the numbers depend on.
        sources: the files.
        used: of each file, its statements by index.
    """

    file: Path
    roots: Sequence[str] = ROOTS
    sources: dict[Path, Source] = field(default_factory=dict[Path, Source])
    used: dict[Path, set[int]] = field(default_factory=dict[Path, set[int]])

    def __post_init__(self) -> None:
        self.file = self.file.resolve()
        wanted = [(self.file, name) for name in self.roots]
        seen: set[tuple[Path, str]] = set()
        while wanted:
            file, name = wanted.pop()
            if (file, name) in seen:
                continue
            seen.add((file, name))
            if file not in self.used:
                wanted += self._enter(file)
            statements = self.sources[file].statements
            for index in self.sources[file].binding(name):
                if index not in self.used[file]:
                    self.used[file].add(index)
                    wanted += self._names_in(statements[index], file)

    def _enter(self, file: Path) -> Iterator[tuple[Path, str]]:
        """Begin with a file; what its imports do beside binding names counts too."""
        self.sources.setdefault(file, Source(file))
        self.used[file] = set()
        for statement in self.sources[file].statements:
            yield from ((module, _NOTHING) for module, _ in self._imported(statement, file))

    def _names_in(self, statement: ast.stmt, file: Path) -> Iterator[tuple[Path, str]]:
        """What a statement uses: names of its own file, and of modules of one's own."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                yield file, node.id
            else:
                yield from self._imported(node, file)

    def _imported(self, node: ast.AST, file: Path) -> Iterator[tuple[Path, str]]:
        """What a node imports from modules of one's own."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from self._module(alias.name.split("."), EVERYTHING, file)
        elif isinstance(node, ast.ImportFrom):
            path = node.module.split(".") if node.module else []
            for alias in node.names:
                inner = list(self._module([*path, alias.name], EVERYTHING, file, node.level))
                yield from inner or self._module(path, alias.name, file, node.level)

    def _module(
        self, path: list[str], name: str, importer: Path, level: int = 0
    ) -> Iterator[tuple[Path, str]]:
        """A name of a module, if that is one's own, and the packages that it stands in."""
        if level == 0 and (path[0] in sys.stdlib_module_names or path[0] == "persona_nns"):
            return
        folders = [self.file.parent, *map(Path, sys.path)]
        if level:
            folders = [importer.parents[level - 1]]
        if (file := _find(path, folders)) is None or is_installed(file):
            return
        self.sources.setdefault(file, Source(file, ".".join(path)))
        yield file, name
        for package in file.parents[: len(path) - 1]:
            if (init := package / "__init__.py").is_file() and init != file:
                self.sources.setdefault(init, Source(init, package.name))
                yield init, _NOTHING

    @property
    def digest(self) -> str:
        """Hash of the statements, 16 hexadecimal digits; the same wherever the files are."""
        total = hashlib.sha256()
        for file in sorted(self.used, key=lambda file: self.sources[file].name):
            source = self.sources[file]
            total.update(source.name.encode())
            for index in sorted(self.used[file]):
                total.update(ast.dump(source.statements[index]).encode())
                for data in files_named(source.statements[index], [file.parent, Path()]):
                    total.update(data.read_bytes())
        return total.hexdigest()[:16]

    def forget(self) -> None:
        """Have the files read anew when they are executed, in this process too.

        Python keeps modules and lines of files for the life of a process, and nnsight the source
        and the compiled block of each trace by its file and line.
        """
        for source in self.sources.values():
            file = str(source.file)
            module = sys.modules.get(source.name)
            if module is not None and str(Path(str(module.__file__)).resolve()) == file:
                del sys.modules[source.name]
            # Compiled files are told from their sources by the second and the size.
            Path(cache_from_source(file)).unlink(missing_ok=True)
            linecache.cache.pop(file, None)
            forget_traces(file)

    def is_as_read(self) -> bool:
        """Whether no file has changed since."""
        return all(
            source.file.is_file() and source.file.read_bytes() == source.content
            for source in self.sources.values()
        )


def forget_traces(file: str) -> None:
    """Have nnsight read the traces in a file, or in a notebook's cell, anew."""
    traced = sys.modules.get("nnsight.tracing.globals")
    if traced is not None:
        traced.SOURCES.pop(file, None)
        for block in [block for block in traced.BLOCKS if block[0] == file]:
            del traced.BLOCKS[block]


def _find(path: Sequence[str], folders: Sequence[Path]) -> Path | None:
    for folder in folders if path else ():
        whole = folder.joinpath(*path)
        for file in (whole.with_name(f"{whole.name}.py"), whole / "__init__.py"):
            if file.is_file():
                return file.resolve()
    return None


def is_installed(file: Path) -> bool:
    """Whether a file is of an installed package."""
    return not {"site-packages", "dist-packages"}.isdisjoint(file.parts)


def files_named(statement: ast.AST, folders: Sequence[Path]) -> Iterator[Path]:
    """Files that a text in a statement is the name of: they are read, as likely as not."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and isinstance(text := node.value, str) and "." in text:
            with suppress(OSError, ValueError):  # no path at all
                yield from (folder / text for folder in folders if (folder / text).is_file())


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file binds; none where it may do more."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {statement.name}
        case ast.Import() | ast.ImportFrom() if statement.names[0].name != EVERYTHING:
            return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
        case ast.Assign() | ast.AnnAssign():
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            if all(isinstance(target, ast.Name) for target in targets):
                return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def strip(tree: Tree) -> Tree:
    """Take docstrings and words off all nodes of a tree; returns the tree."""
    for node in ast.walk(tree):
        _strip(node)
    return tree


def _strip(node: ast.AST) -> None:
    body = getattr(node, "body", None)
    if isinstance(body, list) and body and isinstance(node, _DOCUMENTED):
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = body[1:]
    if isinstance(node, ast.Call) and _called(node.func) == "Variable":
        node.args = node.args[:1]
        node.keywords = [each for each in node.keywords if each.arg not in _WORDS]


_DOCUMENTED = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
