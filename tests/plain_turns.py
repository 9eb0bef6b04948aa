"""Conversations in plain transformers: one at a time, unpadded, with hooks, turn by turn.

Shares nothing with the library: the template of the random models is spelt out, caches are filled
explicitly, and what is said is a whole pass for every token.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from plain_hooks import blocks_of
from torch import Tensor
from transformers import DynamicCache

Talk = list[tuple[str, str]]
Edit = Callable[[Tensor], Tensor]
Spans = Sequence[tuple[int, int]]
END = 2  # of the random models' texts
HEADER = "<|im_start|>assistant\n"


def rendered(tokenizer: Any, talk: Sequence[tuple[str, str]]) -> tuple[list[int], list[Any]]:
    """Token ids of a conversation, and of each message its first content token and the one past."""
    text, places = "", []
    for role, content in talk:
        text += f"<|im_start|>{role}\n"
        start = len(text) + len(content) - len(content.lstrip())
        places.append(range(start, start + len(content.strip())))
        text += f"{content}<|im_end|>\n"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for place in places:
        inside = []
        for token, (start, stop) in enumerate(encoded["offset_mapping"]):
            letters = [at for at in range(start, stop) if not text[at].isspace()]
            if letters and letters[0] in place:
                inside.append(token)
        spans.append((inside[0], inside[-1] + 1) if inside else None)
    return encoded["input_ids"], spans


@contextmanager
def edited(plain: Any, edits: dict[int, Edit], spans: Spans) -> Any:
    """What enters some blocks is edited, at some tokens of what is run."""
    handles = []
    for layer, edit in edits.items():

        def hook(_: Any, args: Any, kwargs: Any, edit: Edit = edit) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            for start, stop in spans:
                hidden[:, start:stop] = edit(hidden[:, start:stop])
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        handles.append(blocks_of(plain)[layer].register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def behind_a_cache(
    plain: Any,
    ids: list[int],
    window: tuple[int, int],
    earlier: Spans,
    edits: tuple[dict[int, Edit], dict[int, Edit]],
) -> Tensor:
    """Log-probabilities in a window, behind the keys and values of what is before it.

    Both are computed in a pass of their own: with an edit of the earlier windows, and of this one.
    """
    start, stop = window
    cache = DynamicCache()
    with edited(plain, edits[0], earlier):
        plain(torch.tensor([ids[:start]]), past_key_values=cache, use_cache=True)
    position = torch.arange(start, stop)[None]
    given = {"past_key_values": cache, "position_ids": position, "use_cache": True}
    with edited(plain, edits[1], [(0, stop - start)]):
        logits = plain(torch.tensor([ids[start:stop]]), **given).logits[0]
    return logits.double().log_softmax(-1)


def in_one_pass(
    plain: Any, ids: list[int], window: tuple[int, int], spans: Spans, edits: dict[int, Edit]
) -> Tensor:
    """Log-probabilities in a window of a whole pass in which tokens are edited."""
    with edited(plain, edits, spans):
        logits = plain(torch.tensor([ids]), use_cache=False).logits[0]
    return logits[window[0] : window[1]].double().log_softmax(-1)


def answers(
    plain: Any,
    tokenizer: Any,
    script: Sequence[str],
    acts: tuple[bool, bool],
    edits: dict[int, Edit],
    n_tokens: int,
    system: str | None = None,
) -> list[str]:
    """What a model says turn by turn: every token by a whole pass, without a cache.

    Args:
        plain: the model.
        tokenizer: its tokenizer.
        script: what the user says.
        acts: edit earlier windows, and this one from the last token of the prompt on.
        edits: of what enters some blocks.
        n_tokens: the most tokens of an answer.
        system: a system text.
    """
    talk: Talk = [] if system is None else [("system", system)]
    for asked in script:
        talk.append(("user", asked))
        ids, spans = rendered(tokenizer, talk)
        ids = ids + tokenizer(HEADER, add_special_tokens=False)["input_ids"]
        of_turn = zip(talk, spans, strict=True)
        earlier = [(s[0] - 1, s[1]) for (role, _), s in of_turn if role == "assistant" and s]
        now, said = [(len(ids) - 1, len(ids) + n_tokens)], []
        while len(said) < n_tokens and END not in said:
            with edited(plain, edits, [*earlier * acts[0], *now * acts[1]]):
                logits = plain(torch.tensor([[*ids, *said]]), use_cache=False).logits
            said.append(int(logits[0, -1].argmax()))
        talk.append(("assistant", tokenizer.decode(said, skip_special_tokens=True)))
    return [text for role, text in talk if role == "assistant"]


def scores(
    plain: Any, tokenizer: Any, talk: Talk, add: dict[int, Edit], system: str
) -> dict[int, dict[str, tuple[float, float]]]:
    """Log-probability and KL(clean_kv ‖ condition) by turn and condition of `steering_memory`."""
    ids, spans = rendered(tokenizer, talk)
    told = [("system", system), *talk[talk[0][0] == "system" :]]
    told_ids, told_spans = rendered(tokenizer, told)
    earlier: list[tuple[int, int]] = []
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for turn, ((role, _), span) in enumerate(zip(talk, spans, strict=True)):
        if role != "assistant" or span is None:
            continue
        window = (span[0] - 1, span[1])
        run = (plain, ids, window)
        logprobs = {
            "none": in_one_pass(*run, [], {}),
            "steered": in_one_pass(*run, [*earlier, window], add),
            "clean_kv": behind_a_cache(*run, earlier, ({}, add)),
            "dirty_kv": behind_a_cache(*run, earlier, (add, {})),
        }
        # What the caches are for can be had in one pass too.
        torch.testing.assert_close(logprobs["clean_kv"], in_one_pass(*run, [window], add))
        torch.testing.assert_close(logprobs["dirty_kv"], in_one_pass(*run, earlier, add))
        first = told_spans[turn + len(told) - len(talk)][0]
        told_window = (first - 1, first + span[1] - span[0])
        logprobs["system"] = in_one_pass(plain, told_ids, told_window, [], {})
        reference = logprobs["clean_kv"][:-1]
        found[turn] = {
            name: (
                float(each[range(len(each) - 1), ids[slice(*span)]].sum()),
                float((reference.exp() * (reference - each[:-1])).sum()),
            )
            for name, each in logprobs.items()
        }
        earlier.append(window)
    return found
