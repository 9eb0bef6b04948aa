"""The client of a model that runs on a server: names and tokenizer, no weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

from nnsight import TransformersModel
from nnsight.modeling.huggingface import _ID_CACHE
from transformers import PreTrainedConfig

from persona_nns.errors import PersonaError, UsageError, one_line
from persona_nns.models.adapters import Adapter, base_of, label_with, warn_of_other_base
from persona_nns.models.attached import Fingerprint, attach, check_attachable
from persona_nns.models.checkpoints import (
    HUB_ID,
    check_no_adapter,
    digest_of,
    find_checkpoint,
    load_tokenizer,
    read_config,
    version_of,
)
from persona_nns.models.checks import check_names
from persona_nns.models.choices import choose_dtype
from persona_nns.models.names import STANDARD_NAMES
from persona_nns.models.records import HOSTED, origin_of, write_record
from persona_nns.models.servers import Server, read_backend


@dataclass(frozen=True)
class HostedModel:
    """Where a model runs that is not loaded here.

    Attributes:
        server: where it runs.
        repo_id: the name it is hosted under.
        key: what nnsight asks the server for.
        adapter: what tells that the adapter asked for is attached there; None where none is.
    """

    server: Server
    repo_id: str
    key: str
    adapter: Fingerprint | None = None


#: Before the revision that a server is asked for, in what is known of a model's version.
AT = " at "
_HOSTED: WeakKeyDictionary[TransformersModel, HostedModel] = WeakKeyDictionary()


def load_weightless(
    name: str,
    server: Server | None,
    template: str | Path | None,
    label: str | None,
    adapter: Adapter | None,
    *,
    revision: str | None,
    trust_remote_code: bool,
) -> TransformersModel:
    """Build the client of a hosted model: names and tokenizer, no weights.

    An adapter's modules are attached to it, as they are on the server, without their weights:
    what travels with each request is the adapter's name.

    Args:
        name: a bundled model, a local folder, or a hub id.
        server: the server; None starts one.
        template: as in `load_model`.
        label: as in `load_model`.
        adapter: that is put on it.
        revision: as in `load_model`.
        trust_remote_code: as in `load_model`.
    """
    source, shown = find_checkpoint(name)
    repo_id = hosted_name(name, label) if server is not None else f"simulated/{Path(shown).name}"
    if adapter is not None:
        check_no_adapter(shown, base_of(source), adapter)
        check_attachable(adapter)
        warn_of_other_base(adapter, [shown, source, repo_id])
    config = read_config(source, shown, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(name, template, adapter=adapter, trust_remote_code=trust_remote_code)
    # Both are in the key that the server is asked with.
    asked: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    asked |= {"revision": revision} if revision else {}
    try:
        model = TransformersModel(
            source,
            task="text-generation",
            tokenizer=tokenizer,
            rename=STANDARD_NAMES,
            attn_implementation="eager",
            **asked,
        )
    except ValueError as error:
        raise PersonaError(f"The model {shown!r} is not supported: {one_line(error)}") from error
    attached = None if adapter is None else attach(model, adapter)
    check_names(model, shown)
    _ID_CACHE[source] = repo_id
    origin: Mapping[str, Any] = {}  # nothing is known here of a hosted model's weights
    if server is None:
        origin = origin_of(model, source, shown)
        precision, version = choose_dtype(shown, config, None), version_of(source, config)
        server = simulate(model, source, repo_id, precision)
    else:
        precision, name = HOSTED, repo_id
        version = f"{HOSTED} {_hosted_version(source, config)}"
        version += f"{AT}{revision}" if revision else ""
    _HOSTED[model] = HostedModel(server, repo_id, model.to_model_key(), attached)
    if label is None or label == repo_id:  # the name it is hosted under is not the adapter's
        label = label_with(label or shown, adapter)
    write_record(model, label, name, version, precision, origin, adapter)
    return model


def simulate(model: TransformersModel, source: str, repo_id: str, precision: str) -> Server:
    """Start a server process for a model, which ends when the model is gone."""
    from persona_nns.models.loopback import LoopbackServer

    server = LoopbackServer(source, repo_id, precision)
    finalize(model, server.stop)  # this also keeps it
    return server.address


def hosted_name(name: str, label: str | None) -> str:
    """The ``org/name`` under which a server is asked for a model.

    Raises:
        UsageError: a folder or bundled model without the name of a hosted one, or an adapter.
    """
    source, shown = find_checkpoint(name)
    if (base := base_of(source)) is not None:
        raise UsageError(
            f"The folder {shown!r} is an adapter, which a server does not host; name its model "
            f"({base}), and the folder with --adapter."
        )
    if source == name and not Path(name).expanduser().is_dir():
        return name
    if label is None or not HUB_ID.fullmatch(label):
        raise UsageError(
            f"A server is asked for {shown!r} under the name it is hosted under; "
            "add --as org/name (its configuration and tokenizer are read here)."
        )
    return label


def check_hosting(names: Sequence[str], labels: Sequence[str] | None, backend: str) -> None:
    """See that a backend can be asked for some models before anything runs.

    Raises:
        UsageError: no such backend, or a model that it cannot be asked for.
    """
    if isinstance(read_backend(backend), Server):
        for name, label in zip(names, labels or [None] * len(names), strict=True):
            hosted_name(name, label)


def _hosted_version(source: str, config: PreTrainedConfig) -> str:
    """What is known here of a hosted model's version: never its weights."""
    folder = Path(source)
    return digest_of([folder / "config.json"]) if folder.is_dir() else version_of(source, config)


def hosted(model: TransformersModel) -> HostedModel | None:
    """Where a model runs that is not loaded here; None for one that is."""
    return _HOSTED.get(model)
