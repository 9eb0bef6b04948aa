"""The standard names of a model's modules, whatever its architecture calls them.

``model.layers[L]`` (with ``.attn``, ``.attn.o_proj``, ``.mlp`` and, where it has one,
``.input_norm``), ``model.embed`` (and, where one follows it, ``model.embed_dropout``),
``model.final_norm``, ``model.lm_head``; ``model.output.logits`` are the logits (an architecture may
cap them after ``lm_head``).
"""

STANDARD_NAMES = {
    "*.layers": "layers",
    "*.h": "layers",
    "*.embed_tokens": "embed",
    "*.wte": "embed",
    "*.embed_in": "embed",
    "*.drop": "embed_dropout",
    "*.emb_dropout": "embed_dropout",
    "*.norm": "final_norm",
    "*.ln_f": "final_norm",
    "*.final_layer_norm": "final_norm",
    "self_attn": "attn",
    "attention": "attn",
    "attn.c_proj": "attn.o_proj",
    "attention.dense": "attention.o_proj",
    "input_layernorm": "input_norm",
    "ln_1": "input_norm",
    "*.rotary_emb": "rotary_emb",
}
