"""Where numbers come from: what determines them (identity), and what else is known (session)."""

import hashlib
import json
import platform
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from persona_nns.declarations.catalog import Experiment
from persona_nns.declarations.options import changes_numbers, is_as_before, is_content
from persona_nns.declarations.plans import Plan, content_digest
from persona_nns.declarations.record import ModelRecord
from persona_nns.errors import UsageError

_PACKAGES = ("persona-nns", "nnsight", "torch", "transformers", "tokenizers", "xarray", "zarr")


def identity(
    experiment: Experiment,
    record: ModelRecord,
    plan: Plan,
    parameters: Mapping[str, Any],
) -> str:
    """Hash of all that determines the numbers of a run, 64 hexadecimal digits.

    Not in it, because the numbers do not depend on them: which units were asked for, device,
    batch size, package versions, options that are marked ``EXECUTION``.

    Args:
        experiment: what is measured.
        record: on which model, in which precision.
        plan: on which inputs; texts, markers and token ids count, their order does not.
        parameters: layers, positions and options, complete.
    """
    determining = {
        "experiment": experiment.name,
        "protocol_version": experiment.version,
        "model": [
            record.version if _is_digest(record.version) else [record.source, record.version]
        ],
        "precision": record.precision,
        "attn_implementation": record.attn_implementation,
        "cells": dict(plan.content),
        "token_ids": {key: dict(of_key) for key, of_key in plan.token_ids.items()},
        "parameters": _determining(experiment, parameters),
    }
    return content_digest(determining)


def kindred(experiment: Experiment, record: ModelRecord, parameters: Mapping[str, Any]) -> str:
    """Hash of all that determines the numbers of a unit at a layer, but for the unit itself.

    Runs that agree in it have measured the same wherever they share units (`unit_digests`) and
    layers. Where no variable has a dimension of the layers that were asked for, every number
    depends on all of them.
    """
    measured = [each for each in experiment.variables.values() if not each.every_layer]
    apart = {"layers"} if any("layer" in each.axes for each in measured) else set()
    of_a_layer = {name: value for name, value in parameters.items() if name not in apart}
    nothing = Plan("", (), {}, (), {}, {}, "")
    return identity(experiment, record, nothing, of_a_layer)


def unit_digests(experiment: Experiment, plan: Plan) -> dict[str, str]:
    """What tells by label whether two plans mean the same by a unit, 12 hexadecimal digits each.

    The unit of an experiment's own plan may depend on any of the inputs.
    """
    if experiment.plan is None:
        return {
            unit.label: content_digest([plan.content[unit.label], plan.token_ids[unit.label]])[:12]
            for unit in plan.units
        }
    whole = content_digest([dict(plan.content), {k: dict(v) for k, v in plan.token_ids.items()}])
    return {unit.label: whole[:12] for unit in plan.units}


def _determining(experiment: Experiment, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's parameters that tell it from others; layers and positions are such.

    Sets of layers of which there are none are not: an experiment may do without them.
    """
    options = experiment.options
    return {
        name: _held(value) if name in options and is_content(options[name]) else value
        for name, value in parameters.items()
        if (value or name != "layer_sets")
        and (
            name not in options
            or (changes_numbers(options[name]) and not is_as_before(options[name], value))
        )
    }


def _held(files: Sequence[str] | None) -> list[str] | None:
    """Digests of what files hold, in an order that their names do not change.

    Raises:
        UsageError: a file cannot be read.
    """
    if files is None:
        return None
    digests: list[str] = []
    for file in files:
        try:
            held = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise UsageError(f"The file {file!r} cannot be read: {error.strerror}.") from error
        digests.append(hashlib.sha256(held).hexdigest())
    return sorted(digests)


def _is_digest(version: str) -> bool:
    """Whether it is a folder's SHA-256, which says all; a commit needs its repository's name."""
    return len(version) == 64


def run_name(label: str, plan: Plan, digest: str) -> str:
    """The name of a run's group: readable, and different for each label and identity.

    The order of the inputs is in it too: two processes that allocate one run at the same moment
    agree on what they write.
    """
    unique = content_digest([label, digest, [[axis, *of] for axis, of in plan.axes.items()]])
    return f"{label.replace('/', '--')}.{plan.name}.{unique[:10]}"


def run_attributes(
    experiment: Experiment,
    record: ModelRecord,
    plan: Plan,
    parameters: Mapping[str, Any],
    plan_options: Mapping[str, Any],
    digest: str,
    template: str | None,
) -> dict[str, Any]:
    """What a run's group says of itself.

    Args:
        experiment: what is measured.
        record: on which model.
        plan: on which inputs.
        parameters: layers, positions and options, complete.
        plan_options: options that only say where the inputs come from; those of ``parameters``
            that are marked ``EXECUTION`` or ``CONTENT`` stand beside them.
        digest: the run's identity.
        template: the chat template, if there is one.
    """
    determining = _determining(experiment, parameters)
    options = experiment.options.items()
    marked = {name for name, each in options if not changes_numbers(each)}
    # Of files that are known by what they hold, their paths.
    marked |= {name for name, each in options if is_content(each) and parameters.get(name)}
    execution = {name: parameters[name] for name in parameters if name in marked}
    origin = {"model_provenance": dict(record.provenance)} if record.provenance else {}
    adapter = {"adapter": dict(record.adapter)} if record.adapter else {}
    quantisation = {"quantisation": dict(record.quantisation)} if record.quantisation else {}
    unverifiable = {"unverifiable": plan.unverifiable} if plan.unverifiable else {}
    return {
        "experiment": experiment.name,
        **_own_file(experiment),
        "summary": experiment.summary,
        "run": run_name(record.label, plan, digest),
        "protocol_version": experiment.version,
        "identity": digest,
        "kindred": kindred(experiment, record, parameters),
        "unit_digests": unit_digests(experiment, plan),
        "model": record.label,
        "model_source": record.source,
        "model_version": record.version,
        **origin,
        **adapter,
        **quantisation,
        "architecture": record.architecture,
        "precision": record.precision,
        "attn_implementation": record.attn_implementation,
        "n_layers": record.n_layers,
        "d_model": record.d_model,
        "grid": plan.name,
        "grid_digest": plan.digest,
        **plan.attrs,
        "template": template or "",
        "template_digest": hashlib.sha256((template or "").encode()).hexdigest(),
        "parameters": determining,
        "plan_options": json.loads(json.dumps({**plan_options, **execution}, default=str)),
        **unverifiable,
        "created": now(),
        "session": session_attributes(),
    }


def _own_file(experiment: Experiment) -> dict[str, Any]:
    """Where an experiment of one's own stands: its figures are drawn from there.

    Of a function it is the code itself: a notebook changes.
    """
    if experiment.code is not None:
        return {"code": dict(experiment.code.texts)}
    return {} if experiment.is_shipped else {"file": str(experiment.file)}


def session_attributes() -> dict[str, Any]:
    """The machine, the versions and the commit that compute now."""
    return {
        "started": now(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
    }


def session_name() -> str:
    """A name for this session's note in a store; sortable by time, unique without coordination."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def now() -> str:
    """The time, in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _git_commit() -> str:
    """Commit of the checkout the package runs from, ``-dirty`` where files differ; else empty."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return ""
    command: Sequence[str] = ("git", "describe", "--always", "--dirty", "--abbrev=40")
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return ""
    return answer.stdout.strip()
