"""Can a few trained cache slots stand for a persona, on tasks that they were not trained on?

A cartridge is k keys and values per layer and key-value head, in a slot k places long where the
host's (BY's) persona stood. They begin as the persona's own at the k tokens that are looked at
most, and are trained such that the host says what the prompt with the persona (XY) says to some of
the tasks; the other tasks are held out. Behind the slot stand the host's cached task and tail,
moved (`graft`), or both are run again (`prefix`). Cartridges are saved: `kv_graft --cartridge FILE`
grafts them, and so may a trace of one's own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import (
    Count,
    OutputFolder,
    Plan,
    Variable,
    content_digest,
    label_layer_set,
    scored_tokens,
)
from persona_nns.errors import PersonaError
from persona_nns.figures import cartridge_closure, cartridge_losses
from persona_nns.models import record_of
from persona_nns.prompts import Cell, PromptName, render_cell
from persona_nns.tracing import (
    Cartridge,
    CleanRun,
    Form,
    HostGap,
    Origins,
    Prefilled,
    Spans,
    Window,
    closure,
    fill_sources,
    force,
    graft_spans,
    grafted_tokens,
    initial_slots,
    log_probabilities,
    look_at,
    open_slots,
    say,
    stack_layers,
    substitute,
    summed_kl,
    take,
    weights_of,
)
from persona_nns.traits import (
    CartridgeOptions,
    CartridgeTraining,
    CartridgeUnit,
    Slots,
    cartridge_file,
    check_trains_slots,
    train_once,
    train_slots,
)

protocol_version = 1
# The layer of the oracle: 14 of the 26 of Gemma-2-2B, as in host_injection.
defaults = {"grid": "long", "layer_sets": "0.5385"}

SPLITS = ("train", "held_out")
PROMPTS: tuple[PromptName, ...] = ("BY", "XY")
#: The host with the persona's own keys and values: the graft `persona` of kv_graft.
WHOLE: Origins = {"prefix": "BY", "persona": "XY", "task": "BY", "tail": "BY"}

_CLOSURE = "persona task form slots split"
_SHARE = "Share of the host gap removed, 1 − KL / KL(host); NaN where there is no gap, and in the "
_OTHER_SPLIT = "split that the task is not of."
_sets = {"layer_set": lambda _, asked: [label_layer_set(each) for each in asked["layer_sets"]]}
variables = {
    "closure": Variable(
        _CLOSURE, "closure", description=f"By the persona's cartridge. {_SHARE}{_OTHER_SPLIT}"
    ),
    "kl": Variable(
        _CLOSURE,
        "causal KL",
        units="nat",
        description="KL(clean XY ‖ host with the cartridge) summed over the scored tokens of the "
        f"clean greedy continuation; NaN in the {_OTHER_SPLIT}",
    ),
    "closure_untrained": Variable(
        _CLOSURE,
        "closure, untrained",
        description="By the keys and values that training begins with: the persona's own at the "
        f"tokens that are looked at most. {_SHARE}{_OTHER_SPLIT}",
    ),
    "closure_control": Variable(
        _CLOSURE,
        "closure, another persona's",
        description="By the cartridge of the persona that comes next in the run (after the last, "
        f"the first), as large and trained alike. {_SHARE}{_OTHER_SPLIT}",
    ),
    "closure_full_graft": Variable(
        "persona task",
        "closure, whole persona",
        description="By the persona's own keys and values, all of them: kv_graft's `persona`.",
    ),
    "closure_oracle": Variable(
        "persona task layer_set",
        "closure, residual",
        description="By XY's residual at the host's p_last: host_injection's `oracle`.",
        coords=_sets,
    ),
    "host_kl": Variable(
        "persona task", "causal KL, host", units="nat", description="KL(clean XY ‖ host)."
    ),
    "loss": Variable(
        "persona form slots step",
        "training loss",
        units="nat",
        description="KL of the cartridge before a step, mean over the training tasks.",
    ),
    "cache_bytes": Variable(
        "persona slots",
        "keys and values of the cartridge",
        units="byte",
        description="In the model's precision.",
        kind="int",
    ),
    "cache_bytes_full_graft": Variable(
        "persona task",
        "keys and values of the persona",
        units="byte",
        description="Of the whole persona, in the model's precision.",
        kind="int",
    ),
    "n_eval": scored_tokens("persona task"),
}
figures = {"closure": cartridge_closure, "losses": cartridge_losses}


def prepares(_options: Mapping[str, Any]) -> bool:
    """Whether there is anything to be made first: `prepare` only looks at the model."""
    return False


def prepare(
    model: TransformersModel, _store: str | Path, options: dict[str, Any], **_progress: bool
) -> dict[str, Any]:
    """See that the model is here."""
    check_trains_slots(model)
    return options


def plan(
    tokenizer: PreTrainedTokenizerBase, *, chosen: CartridgeOptions, training: CartridgeTraining
) -> Plan:
    """Render the prompts of each persona with each task.

    Args:
        tokenizer: the model's.
        chosen: which cartridges there are.
        training: how they are trained.
    """
    units = chosen.units()
    first, cells = units[0], [cell for unit in units for cell in unit.cells]
    content = {
        "personas": {unit.persona: unit.cells[0].persona_text for unit in units},
        "tasks": {cell.task: cell.task_text for cell in first.cells},
        "train_tasks": [cell.task for cell in first.cells[: first.n_train]],
        "forms": first.forms,
        "slots": first.slots,
    }
    prompts = {cell.label: render_cell(tokenizer, cell, PROMPTS) for cell in cells}
    return Plan(
        name=chosen.name,
        units=units,
        axes={
            "persona": [unit.persona for unit in units],
            "task": [cell.task for cell in first.cells],
            "form": first.forms,
            "slots": first.slots,
            "split": SPLITS,
            "step": list(range(1, training.steps + 1)),
        },
        unit_axes=("persona",),
        content=content,
        token_ids={
            label: {name: prompt.ids for name, prompt in of_cell.items()}
            for label, of_cell in prompts.items()
        },
        digest=content_digest(content),
        attrs={"inputs": content},
        batch_size=1,
        variables=[name for name in variables if first.control or name != "closure_control"],
        unverifiable="it would read back the files of its cartridges",
        within_window=True,  # beyond it, no gradient reaches the slots
    )


def measure(
    model: TransformersModel,
    units: list[CartridgeUnit],
    *,
    layer_sets: list[list[int]],
    n_eval: Count = 10,
    output: OutputFolder = "stores/cartridges",
    training: CartridgeTraining,
) -> dict[str, Any]:
    """Train cartridges, and put them into hosts.

    Args:
        model: from `load_model`, on this machine.
        units: the personas; the leading axis of every result.
        layer_sets: sets of layers that the oracle is injected at.
        n_eval: reference tokens that the KL is summed over.
        output: folder of the cartridges; one that it holds is not trained again.
        training: how they are trained.
    """
    results: list[dict[str, Any]] = []
    for unit in units:
        own = read_gap(model, unit.cells, n_eval)
        others = measure_others(model, own, layer_sets)
        kl, made = measure_cartridges(
            model, unit, own, partial(make_cartridge, model, Path(output), training)
        )
        closed = closure(kl, others["host_kl"][:, None, None])  # [cartridge, task, form, slots]
        trained, untrained, control = unit.split(closed)
        results.append(
            {
                **others,
                "kl": unit.split(kl)[0],
                "closure": trained,
                "closure_untrained": untrained,
                "closure_control": control,
                "loss": torch.tensor([[each.losses for each in of_form] for of_form in made]),
                "cache_bytes": torch.tensor([each.n_bytes for each in made[0]]),
            }
        )
    names = [name for name in results[0] if units[0].control or name != "closure_control"]
    return {name: torch.stack([each[name] for each in results]) for name in names}


def read_gap(model: TransformersModel, cells: Sequence[Cell], n_eval: int) -> HostGap:
    """Run what does not depend on cartridges, once."""
    sources = fill_sources(model, cells, PROMPTS)
    if sources.rotation.refusal:
        raise PersonaError(sources.rotation.refusal)
    xy = Prefilled([prompt["XY"].ids for prompt in sources.prompts], sources.caches["XY"])
    said = say(model, xy, n_eval)
    said.warn_if_short([cell.label for cell in cells], n_eval)
    forced, scored = said.ids[:, :-1], said.scored("p_last", n_eval)
    clean, attention = look_at_persona(model, xy.followed_by(forced), scored, sources.spans)
    return HostGap(cells, sources, forced, clean, scored, attention)


def look_at_persona(
    model: TransformersModel, window: Window, scored: Tensor, spans: Spans
) -> tuple[Tensor, Tensor]:
    """The clean run's log-probabilities, and where it looks: [task, token of the persona]."""
    personas = [of["XY"]["persona"] for of in spans]
    first = window.padding + torch.tensor([of.start for of in personas], device=scored.device)
    columns = first[:, None] + torch.arange(min(map(len, personas)), device=scored.device)
    asking = torch.arange(scored.shape[1], device=scored.device).expand(len(scored), -1)
    counts = scored[:, None, :, None]
    with model.trace(window.inputs(), logits_to_keep=scored.shape[1]):
        looks = [look_at(block.attn, asking)[0] for block in model.layers]
        clean = save(log_probabilities(model.output.logits))
        each = zip(model.layers, looks, model.output.past_key_values.layers, strict=True)
        weights = [weights_of(block.attn, look, held).float() for block, look, held in each]
        looked = save(
            stack_layers(
                [of.where(counts.to(of.device), 0.0).sum(2).mean(1) for of in weights]
            ).mean(0)
        )
    return clean, looked.gather(1, columns) / scored.sum(1, keepdim=True)


def measure_others(
    model: TransformersModel, gap: HostGap, layer_sets: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """The host as it is, with the whole persona, and with the residual of XY."""

    def kl_of(logits: Tensor) -> Tensor:
        return summed_kl(gap.clean, log_probabilities(logits), gap.scored)

    host, xy = (force(model, gap.prefilled(name), gap.forced) for name in PROMPTS)
    whole = force(model, Prefilled(*graft_spans(gap.sources, WHOLE)), gap.forced)
    p_last = xy.residual[:, :, xy.n_prompt - 1]
    oracle = [kl_of(inject(model, host, layers, p_last)) for layers in layer_sets]
    host_kl, cache = kl_of(host.logits), gap.sources.caches["XY"]
    sizes = torch.tensor(grafted_tokens(gap.sources, WHOLE))
    return {
        "host_kl": host_kl,
        "closure_full_graft": closure(kl_of(whole.logits), host_kl),
        "closure_oracle": closure(torch.stack(oracle, dim=1), host_kl[:, None]),
        "cache_bytes_full_graft": sizes * cache.token_bytes * cache.n_layers,
        "n_eval": gap.scored.sum(1),
    }


def inject(
    model: TransformersModel, host: CleanRun, layers: Sequence[int], value: Tensor
) -> Tensor:
    """The host's logits with residuals, [layer, task, d_model], at its p_last in some layers."""
    n_kept = host.logits.shape[1]
    window = host.narrow(host.p_last, n_kept)
    column = window.column(host.p_last)
    with model.trace(window.inputs(), logits_to_keep=n_kept):
        window.resume(model, layers[0])
        for layer in layers:
            hidden = model.layers[layer].input
            model.layers[layer].input = substitute(hidden, column, value[layer])
        logits = save(model.output.logits)
    return logits  # noqa: RET504 - there only once the trace has run


def measure_cartridges(
    model: TransformersModel,
    unit: CartridgeUnit,
    own: HostGap,
    make: Callable[[HostGap, Form, int], Cartridge],
) -> tuple[Tensor, list[list[Cartridge]]]:
    """KL with the persona's cartridge, with what that began as, and with another persona's.

    Returns:
        KL [cartridge, task, form, slots], and the persona's cartridges [form][slots].
    """
    n_eval = own.scored.shape[1]
    other = read_gap(model, unit.control[: unit.n_train], n_eval) if unit.control else None
    learnt = own.first(unit.n_train)
    made: list[list[Cartridge]] = []
    shape = 3, len(unit.cells), len(unit.forms), len(unit.slots)
    kl = torch.full(shape, torch.nan, device=model.device)
    for f, form in enumerate(unit.forms):
        made.append([make(learnt, form, slots) for slots in unit.slots])
        for s, slots in enumerate(unit.slots):
            hosts = open_slots(own.sources, own.forced, slots, form)
            begun = initial_slots(learnt.sources, learnt.attention.mean(0), slots, made[f][s].seed)
            filled = [hosts.with_cartridge(made[f][s]), hosts.holding(*begun, own.start)]
            if other is not None:
                filled.append(hosts.with_cartridge(make(other, form, slots)))
            for k, window in enumerate(filled):
                kl[k, :, f, s] = score(model, own, window, hosts.predicting)
    return kl, made


def make_cartridge(
    model: TransformersModel,
    output: Path,
    training: CartridgeTraining,
    gap: HostGap,
    form: Form,
    slots: int,
) -> Cartridge:
    """The cartridge that is trained on these tasks; from its file, where there is one."""
    hosts = open_slots(gap.sources, gap.forced, slots, form)

    def loss(keys: Tensor, values: Tensor) -> Tensor:
        window = hosts.holding(keys, values, gap.start)
        return score(model, gap, window, hosts.predicting).mean()

    def train(checkpoints: Path) -> Cartridge:
        begun = initial_slots(gap.sources, gap.attention.mean(0), slots, training.seed)
        trained = Slots(*begun)
        losses = train_slots(trained, loss, training, checkpoints, device=model.device)
        return trained.cartridge(record_of(model), gap, form, training.seed, losses)

    asked = [[prompt[name].ids for name in PROMPTS] for prompt in gap.sources.prompts]
    determining = [form, slots, asked, gap.forced.shape[1], vars(training), protocol_version]
    name = f"{gap.cells[0].persona}-{form}-{slots}"
    return train_once(cartridge_file(output, model, name, determining), train)


def score(model: TransformersModel, gap: HostGap, window: Window, predicting: Tensor) -> Tensor:
    """KL of what is said on hosts with keys and values in their slots, [task].

    Gradients go back to these: it is the loss, too.
    """
    with model.trace(window.inputs()):
        model.lm_head.input = take(model.lm_head.input, predicting)
        predicted = log_probabilities(model.output.logits)
        kl = save(summed_kl(gap.clean, predicted, gap.scored))
    return kl  # noqa: RET504 - there only once the trace has run
