"""What travels to a server: a measurement as source text, with all of our code that it uses.

nnsight ships functions by their source, and everything that is installed by its name. Here the
package itself and the researcher's own files go by value, whether installed or not, and a few
things that would tie a request to this machine are left behind: annotations (they name libraries
that the server may lack), paths, and the compiled methods that a dataclass generates.
"""

import ast
import dataclasses
import hashlib
import io
import sys
import sysconfig
import types
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import nnsight
import zstandard
from cloudpickle.cloudpickle import (
    _class_setstate,
    _dynamic_class_reduce,
    _should_pickle_by_reference,
)
from nnsight import TransformersModel, save
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.intervention.serialization import (
    DEFAULT_PROTOCOL,
    CustomCloudPickler,
    _load_function,
    reduce_block,
)
from nnsight.tracing.tracer import Tracer
from nnsight.tracing.util import SerializedFrame

from persona_nns.declarations.plans import Unit
from persona_nns.errors import UsageError
from persona_nns.models.hosting import hosted
from persona_nns.prompts.grids import Cell
from persona_nns.prompts.render import with_prompts
from persona_nns.runs.remote.program import Terms, carry_out
from persona_nns.runs.request import Request

_GENERATED = ("<string>", dataclasses.__file__)
_PARAMETERS = ("init", "repr", "eq", "order", "unsafe_hash", "frozen")
_FIELD = ("default", "default_factory", "init", "repr", "hash", "compare", "kw_only")


#: Read by both tokenizers, which have to agree.
SAMPLE = 'As a head chef (née Zoë), comment on 3 ways to say "no" —\n\tand why.'


@dataclasses.dataclass(frozen=True)
class Payload:
    """A serialised request.

    Attributes:
        data: what is sent, compressed.
        compiled: functions that could only be shipped as bytecode, which a server with another
            Python cannot run.
    """

    data: bytes
    compiled: tuple[str, ...]


class Capture(RemoteBackend):
    """A backend that keeps a session's block as a `Payload` instead of sending it."""

    def __init__(self) -> None:
        self.payload: Payload | None = None

    def __call__(self, tracer: Tracer | None = None) -> None:
        """Serialise the block."""
        assert tracer is not None
        assert tracer.info is not None
        _register_own_code()
        frame = tracer.info.frame
        block = reduce_block(tracer.node, frame.f_globals, dict(frame.f_locals))
        buffer = io.BytesIO()
        pickler = _Pickler(buffer, protocol=DEFAULT_PROTOCOL)
        pickler.dump((tracer, block))
        data = zstandard.ZstdCompressor(level=9).compress(buffer.getvalue())
        self.payload = Payload(data, tuple(dict.fromkeys(pickler.compiled)))


def payload_of(
    model: TransformersModel,
    request: Request,
    units: Sequence[Unit],
    execution: Mapping[str, Any],
    *,
    check: bool,
) -> Payload:
    """The request body that asks a server to measure some units.

    Args:
        model: the client of the hosted model.
        request: what is measured.
        units: of one job; cells travel with their rendered prompts.
        execution: arguments of `measure` that do not change its numbers.
        check: the job checks the model's names first.
    """
    measure, tokenizer = request.experiment.measure, model.tokenizer
    rendered = [with_prompts(tokenizer, unit) if isinstance(unit, Cell) else unit for unit in units]
    arguments = request.measuring(execution)
    terms = Terms(
        shown=request.block.model,
        template=tokenizer.chat_template,
        sample=SAMPLE,
        sample_ids=tuple(tokenizer(SAMPLE)["input_ids"]),
        check=check,
        adapter=place.adapter if (place := hosted(model)) is not None else None,
    )
    capture = Capture()
    with model.session(backend=capture):
        outcome = save(carry_out(model, measure, rendered, arguments, terms))  # noqa: F841
    assert capture.payload is not None
    return capture.payload


def _register_own_code() -> None:
    """Have the package and every loaded module that is not installed shipped by value."""
    nnsight.register("persona_nns")
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        ours = top.startswith("persona_nns")  # experiments too, which a wheel installs
        if getattr(module, "__file__", None) and (ours or not _is_installed(top)):
            nnsight.register(top)


_installed_names = cache(packages_distributions)


def _is_installed(package: str) -> bool:
    """Whether a top-level name is Python's own or an installed package's."""
    if package in sys.stdlib_module_names or package in _installed_names():
        return True
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return file.startswith((sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")))


class _Pickler(CustomCloudPickler):
    """nnsight's pickler, with less of this machine in what it writes."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.compiled: list[str] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, SerializedFrame):  # names the file of the block
            obj.f_code.co_filename = Path(obj.f_code.co_filename).name
        if (
            isinstance(obj, type)
            and dataclasses.is_dataclass(obj)
            and not _should_pickle_by_reference(obj)
            and "__slots__" not in vars(obj)
        ):
            return _reduce_dataclass(obj)
        return super().reducer_override(obj)

    def _dynamic_function_reduce(self, func: types.FunctionType) -> tuple[Any, ...]:
        if hasattr(func, "__wrapped__"):
            # The source found for a decorated function is the one of the function within.
            func = _unnamed(func)
        load, arguments, names, *rest = super()._dynamic_function_reduce(func)
        if load is not _load_function:
            self.compiled.append(func.__qualname__)
            return (load, arguments, names, *rest)
        source, name, defaults, keyword_defaults, _, file, line = arguments
        # A server keeps blocks it has read by file and line: another source is another file.
        digest = hashlib.sha256(source.encode()).hexdigest()[:12]
        arguments = (source, name, defaults, keyword_defaults, None, _origin(file, digest), line)
        names = {key: _used_part(key, value, source, name) for key, value in names.items()}
        return (load, arguments, names, *rest)


def _origin(file: str, digest: str) -> str:
    return f"{Path(file).parent.name}/{Path(file).stem}-{digest}.py"


def _unnamed(func: types.FunctionType) -> types.FunctionType:
    """The same function under the name that its own code has in its source."""
    code = func.__code__
    twin = types.FunctionType(
        code, func.__globals__, code.co_name, func.__defaults__, func.__closure__
    )
    twin.__kwdefaults__ = func.__kwdefaults__
    return twin


def _used_part(name: str, value: Any, source: str, function: str) -> Any:
    """A module of ours that a function uses as a whole, reduced to what it uses of it.

    Raises:
        UsageError: what it uses cannot be told from its source.
    """
    if not isinstance(value, types.ModuleType) or _is_installed_module(value):
        return value
    used = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
    }
    parts = {attribute: getattr(value, attribute) for attribute in used}
    for attribute, part in parts.items():
        if isinstance(part, types.ModuleType) and not _is_installed_module(part):
            raise UsageError(
                f"{function}() uses {name}.{attribute} as a whole, which cannot be sent to a "
                f"server; import what it needs by name (from {part.__name__} import …)."
            )
    return types.SimpleNamespace(**parts)


def _is_installed_module(module: types.ModuleType) -> bool:
    top = module.__name__.partition(".")[0]
    if top.startswith("persona_nns"):
        return False
    return not getattr(module, "__file__", None) or _is_installed(top)


def _reduce_dataclass(cls: type) -> tuple[Any, ...]:
    """A dataclass without its generated methods, which are made anew where it arrives."""
    make, arguments, (attributes, _), *_ = _dynamic_class_reduce(cls)
    kept = {
        name: value
        for name, value in attributes.items()
        if name not in ("__annotations__", "__match_args__", "__replace__")
        and not name.startswith("__dataclass_")
        and getattr(getattr(value, "__code__", None), "co_filename", None) not in _GENERATED
        and not (name == "__hash__" and value is None)
    }
    own = vars(cls).get("__annotations__", {})
    fields = {
        field.name: {key: getattr(field, key) for key in _FIELD}
        for field in dataclasses.fields(cls)
        if field.name in own
    }
    given = {
        name: {key: value for key, value in settings.items() if value is not dataclasses.MISSING}
        for name, settings in fields.items()
    }
    settings = {name: getattr(cls.__dataclass_params__, name) for name in _PARAMETERS}  # type: ignore[attr-defined]
    return make, arguments, (kept, given, settings), None, None, _restore_dataclass


def _restore_dataclass(cls: type, state: tuple[Any, ...]) -> type:
    """Give a class its methods and fields again. Runs on the server."""
    if "__dataclass_fields__" in vars(cls):  # it came with an earlier request of this client
        return cls
    attributes, fields, settings = state
    _class_setstate(cls, (attributes, {}))
    cls.__annotations__ = dict.fromkeys(fields, object)
    for name, given in fields.items():
        setattr(cls, name, dataclasses.field(**given))
    return dataclasses.dataclass(**settings)(cls)
