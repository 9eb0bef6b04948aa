"""Which code the numbers of a function come from, told from the function as it is now.

A function in a notebook's cell, a script or a module is no file that could be read (`source`). So
it is followed: its own code, and by value all that it uses of the names around it, that is,
functions and classes of one's own and what these use, modules of one's own as a whole, constants,
arrays and tensors. What is installed counts by its name. Comments and docstrings do not count, nor
do names that it does not use.
"""

import ast
import dataclasses
import dis
import enum
import hashlib
import inspect
import linecache
import re
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from persona_nns.declarations.plans import content_digest
from persona_nns.declarations.source import (
    EVERYTHING,
    Code,
    files_named,
    forget_traces,
    is_installed,
    strip,
)
from persona_nns.declarations.timed_cells import codes_in, find_source
from persona_nns.errors import UsageError

_PACKAGE = Path(__file__).parents[1]
_PLAIN = (type(None), bool, int, float, complex, str, range, slice)
# What a class has beside what its own lines say.
_GENERATED = {
    *("__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__hash__"),
    *("__match_args__", "__replace__", "__firstlineno__", "__static_attributes__"),
    *("__dataclass_fields__", "__dataclass_params__", "__abstractmethods__", "_abc_impl"),
}


@dataclasses.dataclass
class FunctionCode:
    """A function, and all that its numbers depend on.

    Attributes:
        function: the function.
        beside: more that they depend on, by name.
        texts: source of the function, and of functions and classes that it uses, by name.
        files: where these are: files, or what stands for the cells of a notebook.
    """

    function: Any  # a types.FunctionType, which would be a method of this class
    beside: Mapping[str, Any]
    texts: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    files: set[str] = dataclasses.field(default_factory=set[str])

    def __post_init__(self) -> None:
        _definition(self.function, self)

    @property
    def place(self) -> str:
        """Where the function stands, for messages."""
        code = self.function.__code__
        return f"{shown_file(code.co_filename)}, line {code.co_firstlineno}"

    @cached_property
    def digest(self) -> str:
        """Hash of what determines the numbers, 16 hexadecimal digits.

        Raises:
            UsageError: of something that the function uses it cannot be told what it holds.
        """
        reader = _Reader(self)
        beside = {name: reader.told(value, name) for name, value in self.beside.items()}
        return content_digest([reader.function(self.function), beside])[:16]

    def read_traces_anew(self) -> None:
        """Have traces read as they are now, where a file was imported again.

        nnsight keeps the source and the compiled block of each trace by its file and line.
        """
        traced = sys.modules.get("nnsight.tracing.globals")
        for file in self.files:
            known = None if traced is None else traced.SOURCES.get(file)
            if known is not None and known != _text(file):
                forget_traces(file)


@dataclasses.dataclass
class _Reader:
    """Tells values as JSON, in such a way that two that are told alike give the same numbers."""

    code: FunctionCode
    seen: dict[int, int] = dataclasses.field(default_factory=dict[int, int])

    def told(self, value: Any, name: str) -> Any:
        """A value that the code knows under a name."""
        if isinstance(value, enum.Enum):
            return ["enum", type(value).__name__, value.name, self.told(value.value, name)]
        if isinstance(value, _PLAIN):
            text = value if isinstance(value, str) else ""
            files = files_named(ast.Constant(text), [Path()])
            return [type(value).__name__, repr(value), *(_hash(f.read_bytes()) for f in files)]
        if isinstance(value, bytes):
            return ["bytes", _hash(value)]
        if isinstance(value, Path):
            return self.told(str(value), name)
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if isinstance(value, list | tuple):
            return [type(value).__name__, *(self.told(each, name) for each in value)]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(content_digest(self.told(each, name)) for each in value)]
        if isinstance(value, Mapping):
            pairs = value.items()
            return ["mapping", *([self.told(k, name), self.told(v, name)] for k, v in pairs)]
        if (array := _array(value)) is not None:
            return array
        if (known := _installed_name(value)) is not None:
            return known
        return self._own(value, name)

    def _own(self, value: Any, name: str) -> Any:
        """What a value of one's own is made of."""
        if id(value) in self.seen:
            return ["again", self.seen[id(value)]]
        self.seen[id(value)] = len(self.seen)
        if isinstance(value, types.ModuleType):
            return self._module(value, name)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.MethodType):
            return ["method", self.told([value.__self__, value.__func__], name)]
        if isinstance(value, partial):
            return ["partial", self.told([value.func, value.args, value.keywords], name)]
        if callable(value) and isinstance(plain := inspect.unwrap(value), types.FunctionType):
            return self.function(plain)
        if isinstance(value, staticmethod | classmethod):
            return [type(value).__name__, self.told(value.__func__, name)]
        if isinstance(value, property):
            return ["property", self.told([value.fget, value.fset], name)]
        if isinstance(value, cached_property):
            return ["property", self.told(value.func, name)]
        if dataclasses.is_dataclass(value):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return ["object", self.told(type(value), name), self.told(fields, name)]
        if type(value).__module__ in ("types", "typing") or _is_torch_word(value):
            return ["word", repr(value)]
        if not _is_elsewhere(type(value).__module__) and hasattr(value, "__dict__"):
            return ["object", self.told(type(value), name), self.told(vars(value), name)]
        raise UsageError(
            f"{self.code.function.__name__}() uses {name!r}, and what a {type(value).__name__} "
            "holds cannot be told: make it an argument or a plain value, tensor or array, or "
            "number the function's versions yourself: pn.as_experiment(…, version=1)."
        )

    def function(self, function: types.FunctionType) -> Any:
        """A function of one's own: its code, its defaults, and what it uses."""
        self.seen.setdefault(id(function), len(self.seen))
        node = _definition(function, self.code)
        around = sorted(_around(function, node).items())
        used = {name: self.told(value, name) for name, value in around}
        files = [_hash(file.read_bytes()) for file in files_named(node, [Path()])]
        defaults = self.told([function.__defaults__, function.__kwdefaults__], function.__name__)
        return ["function", ast.dump(strip(node)), defaults, used, files]

    def _class(self, cls: type) -> Any:
        """A class of one's own: its bases, its methods, and the values that it holds."""
        held: dict[str, Any] = {}
        for name, value in vars(cls).items():
            code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
            made = code is not None and not _text(code.co_filename)  # by dataclass, say
            own = isinstance(value, property) or not inspect.isdatadescriptor(value)
            if own and not made and name not in _GENERATED:
                held[name] = self.told(value, f"{cls.__name__}.{name}")
        fields = [
            (field.name, field.default, field.default_factory)
            for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
        ]
        missing = dataclasses.MISSING
        plain = [tuple(None if v is missing else v for v in field) for field in fields]
        bases = self.told(cls.__bases__, cls.__name__)
        return ["class", cls.__qualname__, bases, held, self.told(plain, cls.__name__)]

    def _module(self, module: types.ModuleType, name: str) -> Any:
        """A module of one's own, with those inside it that are loaded."""
        digests: list[str] = []
        for inner, loaded in sorted(sys.modules.items()):
            within = inner == module.__name__ or inner.startswith(f"{module.__name__}.")
            if within and (file := getattr(loaded, "__file__", None)):
                code = Code(Path(file), (EVERYTHING,))
                digests.append(code.digest)
                self.code.files |= set(map(str, code.sources))
                self.code.texts[inner] = Path(file).read_text()
        return ["module", name, *digests]


def _definition(function: types.FunctionType, code: FunctionCode) -> ast.AST:
    """Where a function is defined; its source and file are noted.

    Raises:
        UsageError: there is no source, or it is not that of the function any more.
    """
    if not _text(function.__code__.co_filename):
        find_source(function)
    name, there = function.__name__, function.__code__
    text = _text(there.co_filename)
    if not text:
        raise UsageError(
            f"The source of {name}() is not to be had, and nnsight reads the trace in it there: "
            "define it in a cell of a notebook, or in a file."
        )
    tree = ast.parse(text)
    found = [node for node in ast.walk(tree) if _begins(node, there)]
    if len(found) != 1 or not _is_as_imported(function, text):
        raise UsageError(
            f"{there.co_filename!r} does not have {name}() at line {there.co_firstlineno} as it "
            "was read; import the file again (importlib.reload), and give each function a def."
        )
    code.files.add(there.co_filename)
    lines = inspect.getblock(text.splitlines(keepends=True)[there.co_firstlineno - 1 :])
    code.texts.setdefault(function.__qualname__, "".join(lines))
    return found[0]


def _begins(node: ast.AST, code: types.CodeType) -> bool:
    """Whether a node is the definition that a code was compiled from."""
    if isinstance(node, ast.Lambda):
        return (code.co_name, node.lineno) == ("<lambda>", code.co_firstlineno)
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    first = min([node, *node.decorator_list], key=lambda each: each.lineno)
    return (node.name, first.lineno) == (code.co_name, code.co_firstlineno)


def _is_as_imported(function: types.FunctionType, text: str) -> bool:
    """Whether a file has the code still that a function runs, where it was imported from one."""
    module = sys.modules.get(function.__module__)
    # Others change the code: pytest its asserts, say. A cell's text is kept as it was.
    if type(getattr(module, "__loader__", None)) is not SourceFileLoader:
        return True
    codes = codes_in(compile(text, function.__code__.co_filename, "exec", dont_inherit=True))
    return function.__code__ in codes


def _around(function: types.FunctionType, node: ast.AST) -> dict[str, Any]:
    """What a function uses of the names around it, by name."""
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    around: dict[str, Any] = {}
    for name, cell in cells:
        with suppress(ValueError):  # not bound yet
            around[name] = cell.cell_contents
    names = {
        step.argval
        for inner in codes_in(code)
        for step in dis.get_instructions(inner)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    decorators = getattr(node, "decorator_list", [])
    names |= {n.id for each in decorators for n in ast.walk(each) if isinstance(n, ast.Name)}
    return around | {
        name: function.__globals__[name] for name in names if name in function.__globals__
    }


def _installed_name(value: Any) -> list[str] | None:
    """What something installed is called; None for what is one's own, or holds values."""
    if isinstance(value, types.ModuleType):
        return ["installed", value.__name__] if _is_elsewhere(value.__name__) else None
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    name = name or getattr(value, "__name__", None)
    held = getattr(value, "__self__", None)
    if isinstance(held, type):
        module = held.__module__
    elif held is not None and not isinstance(held, types.ModuleType):
        return None
    if not isinstance(module, str) or not isinstance(name, str) or "<locals>" in name:
        return None
    # Where in a package it stands may change.
    return ["installed", module.partition(".")[0], name] if _is_elsewhere(module) else None


def _is_elsewhere(module: str) -> bool:
    """Whether a module is Python's, installed, or this package."""
    top = module.partition(".")[0]
    if top == "persona_nns" or top in sys.stdlib_module_names:
        return True
    loaded = sys.modules.get(module)
    file = getattr(loaded, "__file__", None)
    if file is None:
        return module != "__main__" and loaded is not None
    return is_installed(Path(file)) or _PACKAGE in Path(file).parents


def _array(value: Any) -> list[Any] | None:
    """An array of numpy's or a tensor of torch's: its kind, shape and bytes."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor) and not value.is_sparse:
        plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return ["tensor", str(value.dtype), list(value.shape), _hash(plain.tobytes())]
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        if value.dtype.hasobject:
            return None
        return ["array", str(value.dtype), list(value.shape), _hash(value.tobytes())]
    return None


def _is_torch_word(value: Any) -> bool:
    """Whether it is a word of torch's such as a dtype."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.dtype | torch.device)


def _text(file: str) -> str:
    """The lines of a file or of a notebook's cell; empty where there are none."""
    linecache.checkcache(file)
    return "".join(linecache.getlines(file))


def shown_file(file: str) -> str:
    """What a person calls a file: of a notebook's cell, its number."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    named = None if shell is None else shell.compile.format_code_name(file)
    return " ".join(named) if named else file


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
