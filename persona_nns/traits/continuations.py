"""How likely a language model is to go on with given texts: exactly, from its own probabilities.

A text of several tokens c₁ … cₖ behind a prompt has the probability

    p(c) = Π p(cⱼ | prompt, c₁ … cⱼ₋₁) · (1 − Σ p(d | prompt, c₁ … cₖ)),

the last factor over the tokens d that would make another text of it: behind "8" those that begin
with a digit. So p("8"), p("85") and p("850") are probabilities of different replies, and do not
depend on how many tokens a tokenizer makes of a number. The tokens of a text are those that the
tokenizer makes of it behind the prompt; other ways to write the same text do not count.

All texts are read in one pass, as a tree: what several begin with stands there once, and a token
attends to the prompt and to the tokens before it in its own texts (a mask of four dimensions). The
numbers 0 to 100, a digit a token, are 101 tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from persona_nns.errors import PersonaError
from persona_nns.tracing.batches import Batch, left_pad

#: Nats by which a text's log-probability may differ in a tree and by itself, by rounding.
_ROUNDING = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class Tree:
    """Texts as a tree of tokens.

    Attributes:
        texts: token ids of each text.
        paths: token ids from the root to each node, its own last; short ones first.
    """

    texts: tuple[tuple[int, ...], ...]
    paths: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "Tree":
        """The tree of some texts."""
        rows = tuple(tuple(text) for text in texts)
        begun = {text[:length] for text in rows for length in range(1, len(text) + 1)}
        return cls(rows, tuple(sorted(begun, key=lambda path: (len(path), path))))

    @property
    def tokens(self) -> Tensor:
        """The token of each node."""
        return torch.tensor([path[-1] for path in self.paths])

    @property
    def depths(self) -> Tensor:
        """How many tokens there are up to each node, its own included."""
        return torch.tensor([len(path) for path in self.paths])

    @property
    def above(self) -> Tensor:
        """[node, other]: whether the other is the node itself or on the way to it."""
        place = {path: k for k, path in enumerate(self.paths)}
        above = torch.zeros(len(self.paths), len(self.paths), dtype=torch.bool)
        for node, path in enumerate(self.paths):
            above[node, [place[path[:length]] for length in range(1, len(path) + 1)]] = True
        return above


@dataclass(frozen=True)
class Prefilled:
    """Prompts that have been run.

    Attributes:
        batch: their tokens, padded on the left.
        cache: their keys and values.
        first: log-probabilities of the token that follows, [prompt, vocabulary].
    """

    batch: Batch
    cache: DynamicCache
    first: Tensor


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Run prompts once.

    Args:
        model: in plain transformers.
        prompts: token ids.
    """
    batch = left_pad(prompts, device=model.device)
    # A cache without a configuration holds every token, in layers with a sliding window too.
    cache = DynamicCache()
    logits = _logits(model, batch.input_ids, batch.attention_mask, batch.position_ids, cache, 1)
    return Prefilled(batch, cache, logits[:, -1].log_softmax(-1))


def text_logprobs(
    model: PreTrainedModel, prompts: Prefilled, tree: Tree, more: Sequence[int]
) -> Tensor:
    """Log-probability of each text right behind each prompt, with nothing of ``more`` behind it.

    Args:
        model: that has run the prompts.
        prompts: from `prefill`; their cache is as before when this is done.
        tree: the texts.
        more: ids of the tokens that would go on with a text.

    Returns:
        [prompt, text], float64 on the CPU.
    """
    device = model.device
    tokens = tree.tokens.to(device).expand(len(prompts.first), -1)
    positions = prompts.batch.position_ids[:, -1:] + tree.depths.to(device)
    masks = _masks(model, prompts.batch, tree.above.to(device), positions)
    logits = _logits(model, tokens, masks, positions, prompts.cache, tokens.shape[1])
    prompts.cache.crop(-tokens.shape[1])
    whole = logits.logsumexp(-1)
    # Each node's token, behind the node above it or behind the prompt.
    place = {path: k for k, path in enumerate(tree.paths)}
    parents = torch.tensor([place.get(path[:-1], -1) for path in tree.paths], device=device)
    steps = logits[:, parents, tokens[0]] - whole[:, parents]
    steps = torch.where(parents < 0, prompts.first[:, tokens[0]], steps)
    goes_on = [token for token in more if token < logits.shape[-1]]
    ended = logits.index_fill_(
        2, torch.tensor(goes_on, device=device, dtype=torch.long), -torch.inf
    )
    ended = (ended.logsumexp(-1) - whole).double().cpu()
    path = steps.double().cpu() @ tree.above.double().T
    nodes = [place[text] for text in tree.texts]
    return (path + ended)[:, nodes]


def _masks(model: PreTrainedModel, batch: Batch, above: Tensor, positions: Tensor) -> Any:
    """What nodes attend to, [prompt, 1, node, column]: 0, or the least number where they do not.

    For a model whose layers differ, by the type of the layer.
    """
    n_prompts, n_nodes = positions.shape
    prompt = batch.attention_mask.bool()[:, None, :].expand(-1, n_nodes, -1)
    seen = torch.cat([prompt, above.expand(n_prompts, -1, -1)], dim=2)
    columns = torch.cat([batch.position_ids, positions], dim=1)[:, None, :]
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    near = seen if window is None else seen & (positions[:, :, None] - columns < window)
    least = torch.finfo(model.dtype).min

    def additive(kept: Tensor) -> Tensor:
        return torch.zeros_like(kept, dtype=model.dtype).masked_fill(~kept, least)[:, None]

    if getattr(config, "layer_types", None) is not None:
        return {"full_attention": additive(seen), "sliding_attention": additive(near)}
    return additive(near)


def _logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Any,
    position_ids: Tensor,
    cache: DynamicCache,
    n_logits: int,
) -> Tensor:
    """Logits of the last tokens, [row, token, vocabulary] in float32; the cache grows."""
    with torch.no_grad():
        out = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=n_logits,
        )
        return out.logits.float()


def check_tree(model: PreTrainedModel, prompt: Sequence[int], tree: Tree) -> None:
    """See that a model reads a tree as it reads its longest text by itself.

    Raises:
        PersonaError: it does not heed such a mask.
    """
    text = max(tree.texts, key=len)
    in_tree = text_logprobs(model, prefill(model, [prompt]), tree, ())[0, tree.texts.index(text)]
    ids = torch.tensor([[*prompt, *text]], device=model.device)
    with torch.no_grad():
        rows = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    alone = rows[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).double().sum()
    if abs(float(in_tree) - float(alone)) > _ROUNDING[model.dtype] * len(text):
        raise PersonaError(
            f"The judge gives a reply of {len(text)} tokens another log-probability among others "
            f"({float(in_tree):.3f}) than by itself ({float(alone):.3f}): an architecture that "
            "heeds no such mask cannot judge on this scale; use --scale yes-no, or another model."
        )
