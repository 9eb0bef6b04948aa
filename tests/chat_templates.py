"""Chat templates of public models, and what they write, spelt out without Jinja.

The templates are shortened to what a conversation without tools needs. A writer gives the same
text as pieces, each with a label, so that a test knows of every character where it comes from.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

Piece = tuple[str, str]  # a text and its label: "" where it is the template's or the frame's own
Said = tuple[str, Sequence[Piece]]  # a role, and what it says
Writer = Callable[[Sequence[Said], bool], list[Piece]]

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)


@dataclass(frozen=True)
class Public:
    """A template, how its text is written, and the tokenizer's special tokens."""

    jinja: str
    writer: Writer
    special: tuple[str, ...]
    bos: str | None = None
    eos: str | None = None
    system_role: bool = True
    user_last: bool = True  # whether the prompt goes on from what is rendered without the header
    strips: tuple[str, ...] = field(default=())  # special tokens that take up white space behind


def with_public_template(tokenizer: Any, public: Public) -> Any:
    """A tokenizer with a public template, its special tokens and, before a text, its bos."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken(each, special=True, normalized=False, rstrip=each in public.strips)
                for each in public.special
            ]
        }
    )
    if public.eos:
        changed.add_special_tokens({"eos_token": public.eos})
    if public.bos:
        changed.add_special_tokens({"bos_token": public.bos})
        changed.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{public.bos} $A", special_tokens=[(public.bos, changed.bos_token_id)]
        )
        assert changed("a")["input_ids"][0] == changed.bos_token_id
    changed.chat_template = public.jinja
    return changed


def turns(
    opening: str, between: str, closing: str, header: str, model: str = "assistant"
) -> Writer:
    """Messages one after the other: opening, role, between, content, closing."""

    def write(said: Sequence[Said], with_header: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for role, content in said:
            name = model if role == "assistant" else role
            pieces += [(f"{opening}{name}{between}", ""), *content, (closing, "")]
        return [*pieces, (header if with_header else "", "")]

    return write


def after(begin: str, writer: Writer) -> Writer:
    return lambda said, header: [(begin, ""), *writer(said, header)]


def with_default_system(default: str, writer: Writer) -> Writer:
    def write(said: Sequence[Said], header: bool) -> list[Piece]:
        own = [] if said[0][0] == "system" else [("system", [(default, "")])]
        return writer([*own, *said], header)  # type: ignore[list-item]

    return write


def llama3(said: Sequence[Said], header: bool) -> list[Piece]:
    day = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    told = list(said[0][1]) if said[0][0] == "system" else []
    others = said[1:] if said[0][0] == "system" else said
    write = turns(
        "<|start_header_id|>",
        "<|end_header_id|>\n\n",
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    return [("<|begin_of_text|>", ""), *write([("system", [(day, ""), *told]), *others], header)]


def gemma3(said: Sequence[Said], header: bool) -> list[Piece]:
    if said[0][0] == "system":
        (_, told), (role, content), *others = said
        said = [(role, [*told, ("\n\n", ""), *content]), *others]
    write = turns("<start_of_turn>", "\n", "<end_of_turn>\n", "<start_of_turn>model\n", "model")
    return [("<bos>", ""), *write(said, header)]


def mistral(said: Sequence[Said], header: bool) -> list[Piece]:
    """v0.3: the system text opens the last user message."""
    del header
    if said[0][0] == "system":
        (_, told), *others, (role, content) = said
        said = [*others, (role, [*told, ("\n\n", ""), *content])]
    pieces: list[Piece] = [("<s>", "")]
    for role, content in said:
        if role == "user":
            pieces += [("[INST] ", ""), *content, ("[/INST]", "")]
        else:
            pieces += [(" ", ""), *content, ("</s>", "")]
    return pieces


def mistral_first(said: Sequence[Said], header: bool) -> list[Piece]:
    """v0.1 and v0.2: no system role."""
    del header
    pieces: list[Piece] = [("<s>", "")]
    for role, content in said:
        around = ("[INST] ", " [/INST]") if role == "user" else ("", "</s>")
        pieces += [(around[0], ""), *content, (around[1], "")]
    return pieces


def olmo2(said: Sequence[Said], header: bool) -> list[Piece]:
    pieces: list[Piece] = [("<|endoftext|>", "")]
    for role, content in said:
        end = "<|endoftext|>\n" if role == "assistant" else "\n"
        pieces += [(f"<|{role}|>\n", ""), *content, (end, "")]
    return [*pieces, ("<|assistant|>\n" if header else "", "")]


def phi3(said: Sequence[Said], header: bool) -> list[Piece]:
    write = turns("<|", "|>\n", "<|end|>\n", "")
    return [*write(said, header), ("<|assistant|>\n" if header else "<|endoftext|>", "")]


CHATML = turns("<|im_start|>", "\n", "<|im_end|>\n", "<|im_start|>assistant\n")
IM = ("<|im_start|>", "<|im_end|>")

PUBLIC = {
    "llama-3.1": Public(
        jinja="""{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
        writer=llama3,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "qwen2.5": Public(
        jinja="""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. ' }}
    {{- 'You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
        writer=with_default_system(
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", CHATML
        ),
        special=IM,
    ),
    "qwen3": Public(
        jinja="""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not message.content.startswith('<tool_response>') %}
        {%- set ns.last_query_index = [ns.last_query_index, index]|min %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
        writer=turns(
            "<|im_start|>",
            "\n",
            "<|im_end|>\n",
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        special=IM,
    ),
    "gemma-2": Public(
        jinja="{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
        "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        writer=after(
            "<bos>",
            turns("<start_of_turn>", "\n", "<end_of_turn>\n", "<start_of_turn>model\n", "model"),
        ),
        special=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        system_role=False,
    ),
    "gemma-3": Public(
        jinja="""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    """
        + ALTERNATE
        + """
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {{- message['content'] | trim -}}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
""",
        writer=gemma3,
        special=("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
    ),
    "mistral-0.3": Public(
        jinja="""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    """
        + ALTERNATE
        + """
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
""",
        writer=mistral,
        special=("[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
    ),
    "mistral-0.1": Public(
        jinja="{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] "
        "== 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
        "'assistant' %}{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user "
        "and assistant roles are supported!') }}{% endif %}{% endfor %}",
        writer=mistral_first,
        special=(),
        bos="<s>",
        eos="</s>",
        system_role=False,
    ),
    "phi-3": Public(
        jinja="{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        writer=phi3,
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        eos="<|endoftext|>",
        user_last=False,
        strips=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "olmo-2": Public(
        jinja="{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
        "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}"
        "{% else %}{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}",
        writer=olmo2,
        special=(),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "smollm2": Public(
        jinja="{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        writer=with_default_system(
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face", CHATML
        ),
        special=IM,
    ),
}
