"""Every experiment that a server can carry out, as a small case, and how two results compare."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from nnsight import TransformersModel

import persona_nns as pn
from persona_nns.declarations.catalog import bundled_experiments, load_experiment
from persona_nns.prompts.grids import load_grid

ON_A_GRID = [
    name for name, file in bundled_experiments().items() if "\ndef plan(" not in file.read_text()
]
#: They train, or take their gradients, where the weights are.
HERE_ONLY = ("trait_distillation", "persona_cartridge")
#: Refused where a prompt is longer than the model's sliding window.
WITHIN_WINDOW = ("kv_budget",)
CELLS = "yoda/haiku,marx/policy,marx/haiku"
_TALK = {"max_new_tokens": 4, "judge": "none"}  # a random model's answers, which nobody can judge
_GIVEN = {"responses": "cheerful.jsonl", "judge": "none"}
_STEERED = {"vector": "v.npy", "layers": "2", "alphas": "0,2"}
_SCRIPT = {"script": "script.jsonl", "layers": "2", "max_new_tokens": 5}
_ROLES = {"default": "", "poet": "Rhyme. ", "cook": "Cook well. ", "judge": "Be fair. "}
ROWS = [
    {"pair": 0, "question_id": k, "label": label, "system": system, **said}
    for k, said in enumerate(
        [
            {"question": "How is the day?", "response": "A fine day."},
            {"question": "And the rain?", "response": "It rains and rains."},
        ]
    )
    for label, system in (("pos", "Be glad."), ("neg", "Be plain."))
]


@dataclass(frozen=True)
class Case:
    """An experiment with the options that make it small.

    Attributes:
        experiment: its name.
        options: of `pn.run`; files among them are those of `write_inputs`.
        shown: what tells it from other cases of the experiment.
    """

    experiment: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    shown: str = ""

    def __str__(self) -> str:
        return f"{self.experiment}-{self.shown}" if self.shown else self.experiment


CASES = [
    Case("persona_patching", {"identities": "identities.txt", "n_questions": 2, "layers": "1,3"}),
    Case("persona_accuracy", {"identities": "identities.txt", "n_questions": 1}),
    Case("trait_vectors", _GIVEN),
    Case("trait_steering", {**_GIVEN, **_STEERED}, "given"),
    Case("trait_steering", {**_STEERED, **_TALK, "top_p": 0.9}, "generated"),
    Case(
        "trait_steering",
        {
            **_GIVEN,
            **_STEERED,
            "layer_sets": "2;1,2",
            "alphas": "-1,2",
            "operations": "add,ablate,cap",
            "taus": "p60,0.5",
            "norm_preserving": True,
            "receipts": True,
        },
        "capped",
    ),
    Case("trait_projections", {"responses": "cheerful.jsonl", "vector": "v.npy"}),
    Case("trait_responses", {**_TALK, "temperature": 0}),
    Case("trait_monitoring", {"vector": "v.npy", **_TALK, "temperature": 0}),
    Case("persona_responses", {"roles": "roles", "max_new_tokens": 4, "temperature": 0}),
    Case("persona_space", {"responses": "said.jsonl", "min_answers": 1}, "given"),
    Case("persona_space", {"roles": "roles", "max_new_tokens": 4, "min_answers": 1}, "generated"),
    Case("persona_drift", {"direction": ["v.npy"], "conversations": "talks.jsonl"}, "given"),
    Case("persona_drift", {**_SCRIPT, "direction": ["v.npy"], "operation": "add"}, "generated"),
    Case(
        "steering_memory",
        {"vector": "v.npy", "conversations": "talks.jsonl", "alphas": "2", "system": "Be glad."},
        "given",
    ),
    Case(
        "steering_memory",
        {**_SCRIPT, "vector": "v.npy", "alphas": "2", "judge": "none"},
        "generated",
    ),
]


def write_inputs(model: TransformersModel) -> None:
    """Write the files that `CASES` name into the current folder."""
    Path("identities.txt").write_text("good\nbad\n")
    Path("cheerful.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    Path("roles").mkdir()
    for role, says in _ROLES.items():
        of_role = {"instruction": [{"pos": says}], "questions": ["Who are you?", "And the rain?"]}
        Path(f"roles/{role}.json").write_text(json.dumps(of_role))
    said = [
        {
            "role": role,
            "system": says,
            "question_id": k,
            "question": question,
            "response": f"It rains. {says}",
        }
        for role, says in _ROLES.items()
        for k, question in enumerate(["Who are you?", "And the rain?"])
    ]
    Path("said.jsonl").write_text("\n".join(map(json.dumps, said)))
    talk = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Rain, rain."}]
    Path("talks.jsonl").write_text(json.dumps({"messages": talk * 2}))
    Path("script.jsonl").write_text(json.dumps({"turns": ["How is the day?", "And the rain?"]}))
    shape = (len(model.layers) + 1, model.config.get_text_config().hidden_size)
    np.save("v.npy", np.random.default_rng(0).normal(size=shape))


def on_grid(name: str, frame: str = "role") -> dict[str, Any]:
    """Options of `pn.run` for an experiment on a grid, small."""
    experiment = load_experiment(name)
    chosen: dict[str, Any] = {"cells": CELLS, "batch_size": 2}
    chosen |= dict.fromkeys({"n_tokens", "n_eval"} & set(experiment.options), 4)
    if name == "head_budget":  # the others take gradients
        chosen["rankings"] = "effect,attention,random"
    if experiment.keeps_residuals:
        chosen["keep_residuals"] = True
    grid = load_grid("short", frame)
    return {"grid": replace(grid, markers=dict.fromkeys(grid.personas, ("the", "of"))), **chosen}


def run_both(
    name: str, local: TransformersModel, remote: TransformersModel, folder: Path, **options: Any
) -> tuple[xr.Dataset, xr.Dataset]:
    """The same here and there, in stores of their own."""
    here = pn.run(name, local, store=folder / "h.zarr", **options)
    return here, pn.run(name, remote, store=folder / "t.zarr", **options)


def compare(here: xr.Dataset, there: xr.Dataset, *, rtol: float = 1e-4, atol: float) -> float:
    """See that two results agree; returns the largest difference between their numbers."""
    np.testing.assert_array_equal(there.completed, here.completed)
    worst = 0.0
    for name in set(here.data_vars) - {"seconds"}:
        ours, theirs = here[name].values, there[name].values
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs, ours, rtol=rtol, atol=atol, err_msg=str(name))
            differences = np.abs(theirs - ours)[np.isfinite(ours)]
            worst = max(worst, float(differences.max(initial=0.0)))
        else:
            np.testing.assert_array_equal(theirs, ours, err_msg=str(name))
    return worst
