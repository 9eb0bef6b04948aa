"""Does steering decay because the cache remembers? This answer steered, the earlier ones, or both.

A vector is added while the assistant answers: in the *window* of each answer, from the token before
its first to its last. The earlier windows leave their keys and values in the cache. So two things
are told apart, for every turn: whether this window is steered, and whether the earlier tokens have
been. `clean_kv` steers this window behind an unsteered cache, `dirty_kv` leaves it alone behind a
steered one; `none` and `steered` do the same with both, and `system` asks in words instead (arXiv
2605.10664). Answers are given, and scored; or the model answers a script in each condition for
itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nnsight import TransformersModel, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_nns.declarations import Count, FileName, Plan, Variable, content_digest
from persona_nns.figures import answers_by_turn, memory_by_turn
from persona_nns.prompts import (
    Messages,
    RenderedChat,
    Talk,
    check_same_turns,
    domains_of,
    read_said,
    render_each,
    render_talks,
    stem_of,
    takes_system_role,
)
from persona_nns.tracing import (
    Acts,
    Average,
    Continuation,
    Held,
    KVCache,
    Opened,
    Operation,
    Spoken,
    Windows,
    answers_of,
    converse,
    deal_answers,
    entry,
    left_pad,
    log_probabilities,
    marked_tokens,
    open_batch,
    open_windows,
    parse_alphas,
    read_cache,
    until_end_of_text,
    window_kl,
    window_logprob,
)
from persona_nns.traits import JudgeOptions, judge_talks, load_direction, load_traits

protocol_version = 1
defaults = {"layers": "0.55"}

#: Where the vector is added: in earlier windows, and in this one.
ACTS = {
    "none": Acts(earlier=False, now=False),
    "steered": Acts(earlier=True, now=True),
    "clean_kv": Acts(earlier=False, now=True),
    "dirty_kv": Acts(earlier=True, now=False),
    "system": Acts(earlier=False, now=False),
}

_of_condition = partial(
    Variable, "conversation turn condition alpha", coords={"condition": list(ACTS)}
)
variables = {
    "logp": _of_condition(
        "log-probability of the answer",
        units="nat",
        description="Sum over the turn's content tokens; of a script, of what `steered` says. NaN "
        "at other speakers.",
    ),
    "kl": _of_condition(
        "KL(clean_kv ‖ condition)",
        units="nat",
        description="Sum over the turn's content tokens, at the same α.",
    ),
    "n_tokens": Variable(
        "conversation turn alpha",
        "scored tokens",
        units="token",
        description="Content tokens of the assistant's turn; NaN at other speakers.",
        kind="int",
        unmeasured=-1,
    ),
    "text": _of_condition(
        "answer",
        description="What the model answers in this condition, after its own answers.",
        kind="text",
    ),
    "score": _of_condition(
        "trait score",
        description="The judge's 0–100 for the condition's own answer; NaN where it refuses.",
        judged=True,
    ),
    "coherence": _of_condition("coherence", description="Likewise for its coherence.", judged=True),
}
_JUDGED = ("score", "coherence")
figures = {"by_turn": memory_by_turn, "answers": answers_by_turn}


@dataclass(frozen=True, eq=False)
class Remembered(Talk):
    """A conversation, or the script of one that the model takes part in.

    Attributes:
        told: the same with the system text; None without one.
        system: the system text.
        vector: [n_layers + 1, d_model].
        alphas: how much of it is added.
    """

    told: RenderedChat | None
    system: str | None
    vector: Tensor
    alphas: tuple[float, ...]


def plan(
    tokenizer: PreTrainedTokenizerBase,
    *,
    model: str,
    vector: FileName,
    vector_run: str | None = None,
    average: Average = "response_avg",
    conversations: FileName | None = None,
    script: FileName | None = None,
    system: str | None = None,
    alphas: str = "0,1,2",
    trait: str | None = None,
    artifacts: FileName | None = None,
    split_seed: int | None = None,
    judging: JudgeOptions,
) -> Plan:
    """Render the conversations, or the scripts.

    Args:
        tokenizer: the model's.
        model: label of the model.
        vector: a file (.npy, .pt, .safetensors, .gguf), or a store's: STORE, STORE#axis, ….
        vector_run: which run, where the store has several.
        average: which average of a store's vectors.
        conversations: a .jsonl file, or a folder of .json files; messages with role and content.
        script: a .jsonl file of user's turns that the model answers, each condition for itself.
        system: the system text of the condition system, in place of a conversation's own.
        alphas: coefficients.
        trait: that the answers to a script are judged for; by default cheerful.
        artifacts: folder with evaluation/{trait}.json, or {trait}.json.
        split_seed: seed that divides the one list of questions of a {trait}.json into halves.
        judging: the judge of the answers to a script.
    """
    said = read_said(conversations, script)
    coefficients = parse_alphas(alphas)
    found = load_direction(vector, model, trait=trait, average=average, run=vector_run)
    chats = render_each(tokenizer, said)
    told = [None] * len(said) if system is None else render_each(tokenizer, said, system)
    n_turns = max(len(chat.turns) for chat in chats)
    shared: dict[str, Any] = {"system": system, "vector": found.vectors, "alphas": coefficients}
    units = [
        Remembered(each.id, each.turns, chat, n_turns, with_text, **shared)
        for each, chat, with_text in zip(said, chats, told, strict=True)
    ]
    content: dict[str, Any] = {
        "said": [[each.id, each.messages] for each in said],
        "vector": content_digest(found.vectors.tolist()),
        "alphas": coefficients,
        "system": system,
    }
    names = [name for name in variables if name not in ("text", *_JUDGED)]
    if script is not None:
        names += ["text"]
        content["judge"] = judging.identity
    if script is not None and judging.judge != "none":
        names += _JUDGED
        questions = [text for each in said for text in each.turns]
        judging.check(trait or "cheerful", questions, tokenizer)
        asked = load_traits(trait or "cheerful", "evaluation", artifacts, split_seed)[0]
        content |= {"trait": asked.name, "eval_prompt": asked.eval_prompt}
    return Plan(
        name=stem_of(str(conversations or script)),
        units=units,
        axes={
            "conversation": [each.id for each in said],
            "turn": list(range(n_turns)),
            "alpha": list(coefficients),
        },
        unit_axes=("conversation",),
        content=content,
        token_ids={
            unit.id: {"chat": unit.chat.ids, "told": unit.told.ids if unit.told else ()}
            for unit in units
        },
        digest=content_digest(content),
        coords=domains_of(said),
        attrs={"vector_source": vector, "system_role": takes_system_role(tokenizer)},
        batch_size=4,
        variables=names,
        width=(found.vectors.shape[0] - 1, found.vectors.shape[1]),
        unverifiable=judging.unverifiable if script is not None else "",
    )


def measure(
    model: TransformersModel,
    units: list[Remembered],
    *,
    layers: list[int],
    max_new_tokens: Count = 256,
    reuse: bool = True,
) -> dict[str, Any]:
    """Score the answers, after letting the model give them where there is a script.

    Args:
        model: from `load_model`.
        units: conversations or scripts.
        layers: where the vector is added, at all of them at once.
        max_new_tokens: the longest answer.
        reuse: keep keys and values from token to token and from turn to turn of a script.
    """
    first = units[0]
    add = [Operation("add", first.vector, alpha, tuple(layers)) for alpha in first.alphas]
    talks: list[dict[str, list[Messages]]] = []
    if first.asked:
        talks = answer_scripts(model, units, add, max_new_tokens, reuse=reuse)
        # What the model says while it is steered is scored in all conditions.
        spoken = [
            run_unsteered(model, *render_talks(model.tokenizer, at["steered"], first.system))
            for at in talks
        ]
    else:
        told = [unit.told for unit in units if unit.told is not None]
        spoken = [run_unsteered(model, [unit.chat for unit in units], told)] * len(first.alphas)
    scored = [
        score_turns(model, each, operation, first.n_turns)
        for operation, each in zip(add, spoken, strict=True)
    ]
    measured = {name: torch.stack([each[name] for each in scored], -1) for name in scored[0]}
    if not talks:
        return measured
    texts = [
        [[answers_of(talk, first.n_turns) for talk in at[name]] for name in at] for at in talks
    ]
    return {**measured, "said": texts}  # [alpha][condition][script][turn]


def run_unsteered(
    model: TransformersModel, chats: Sequence[RenderedChat], told: Sequence[RenderedChat]
) -> Spoken:
    """Run conversations without steering, once."""
    check_same_turns(chats, told)
    clean_told = run_whole(model, told) if told else None
    return Spoken(chats, told, run_whole(model, chats), clean_told)


def run_whole(
    model: TransformersModel,
    chats: Sequence[RenderedChat],
    operation: Operation | None = None,
) -> KVCache:
    """Keys and values of conversations, steered in every window where there is an operation."""
    batch = left_pad([chat.ids for chat in chats], device=model.device)
    marks = marked_tokens(batch, [chat.windows for chat in chats])
    with model.trace(open_batch(batch, None).inputs(cached=True), logits_to_keep=1):
        if operation is not None:
            for layer in operation.layers:
                site = entry(model, layer)
                site.output = operation(site.output, layer, marks)
        cache = save(model.output.past_key_values)
    return read_cache(cache, batch.attention_mask)


def score_turns(
    model: TransformersModel,
    spoken: Spoken,
    operation: Operation,
    n_turns: int,
) -> dict[str, Tensor]:
    """Log-probability and KL of every answer in every condition, [conversation, turn, condition].

    Args:
        model: from `load_model`.
        spoken: conversations.
        operation: adds the vector.
        n_turns: turns that the result has places for.
    """
    logp = torch.full((len(spoken.chats), n_turns, len(ACTS)), torch.nan)
    kl, n_tokens = logp.clone(), torch.full(logp.shape[:2], -1)
    steered = run_whole(model, spoken.chats, operation)
    run = partial(run_windows, model, operation)
    for places in deal_answers(spoken.chats, model.config.get_text_config().vocab_size):
        at = tuple(torch.tensor(places).T)
        clean_kv = open_windows(spoken.clean, spoken.chats, places)
        n_tokens[at] = clean_kv.scored.sum(1).cpu()
        reference = run(clean_kv, now=True)
        for place, (name, acts) in enumerate(ACTS.items()):
            chats, cache = spoken.chats, steered if acts.earlier else spoken.clean
            if name == "system":
                chats, cache = spoken.told, spoken.clean_told
            if cache is None:
                continue
            windows = open_windows(cache, chats, places)
            logprobs = reference if name == "clean_kv" else run(windows, now=acts.now)
            logp[*at, place] = window_logprob(windows, logprobs).cpu()
            kl[*at, place] = window_kl(windows, reference, logprobs).cpu()
    return {"logp": logp, "kl": kl, "n_tokens": n_tokens}


def run_windows(
    model: TransformersModel,
    operation: Operation,
    windows: Windows,
    *,
    now: bool,
) -> Tensor:
    """Log-probabilities in windows, steered or not, [window, column, vocabulary]."""
    marks = windows.inside * now
    with model.trace(windows.inputs):
        for layer in operation.layers:
            model.layers[layer].input = operation(model.layers[layer].input, layer, marks)
        logits = save(model.output.logits)
    return log_probabilities(logits)


def answer_scripts(
    model: TransformersModel,
    units: Sequence[Remembered],
    operations: Sequence[Operation],
    max_new_tokens: int,
    *,
    reuse: bool,
) -> list[dict[str, list[Messages]]]:
    """What is said in every condition: for each α, by condition, the messages of each script."""
    first, scripts = units[0], [unit.asked for unit in units]

    def talk(condition: str, operation: Operation) -> list[Messages]:
        say = partial(answer, model, operation, max_new_tokens)
        system = first.system if condition == "system" else None
        return [*converse(model, scripts, say, ACTS[condition], system=system, reuse=reuse)]

    names = [name for name in ACTS if name != "system" or first.system is not None]
    unsteered = {name: talk(name, operations[0]) for name in names if name in ("none", "system")}
    return [
        {name: unsteered.get(name) or talk(name, operation) for name in names}
        for operation in operations
    ]


def answer(
    model: TransformersModel,
    operation: Operation,
    max_new_tokens: int,
    opened: Opened,
) -> tuple[Continuation, Held | None]:
    """What the model says to conversations, greedily, while it is steered."""
    with until_end_of_text(), model.generate(**opened.settings(max_new_tokens)) as tracer:
        with tracer.invoke(opened.batch.tokens):
            for step in tracer.iter[:]:
                marks = opened.acting(step)
                for layer in operation.layers:
                    site = entry(model, layer)
                    site.output = operation(site.output, layer, marks)
        with tracer.invoke():
            result = save(tracer.result)
    return opened.read(model, result.sequences, result.past_key_values, max_new_tokens)


def finish(
    _tokenizer: PreTrainedTokenizerBase,
    units: Sequence[Remembered],
    measured: dict[str, Any],
    *,
    trait: str | None = None,
    artifacts: str | None = None,
    split_seed: int | None = None,
    judging: JudgeOptions,
) -> dict[str, Any]:
    """The answers as texts, and judged."""
    if "said" not in measured:
        return measured
    said = np.array(measured.pop("said"), dtype=object).transpose(2, 3, 1, 0)
    texts = np.full((*said.shape[:2], len(ACTS), said.shape[3]), "", dtype=object)
    texts[:, :, : said.shape[2]] = said  # the last condition may be left out
    if judging.judge == "none":
        return {**measured, "text": texts}
    judged = load_traits(trait or "cheerful", "evaluation", artifacts, split_seed)[0]
    asked = [unit.asked for unit in units]
    return {**measured, "text": texts, **judge_talks(judged, asked, texts, judging)}
