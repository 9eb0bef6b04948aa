"""The bundled models' own tokenizer: byte-level BPE and a ChatML template."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from persona_nns.organism.corpus import Example

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
PAD_ID, START_ID, END_ID = range(3)
"""Special tokens get the first ids."""
VOCABULARY = 1536

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(examples: Iterable[Example], folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer on prompts and answers, save it into ``folder`` and load it back."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((_plain_text(example) for example in examples), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a prompt with its generation header."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(str(text), add_special_tokens=False)


def _plain_text(example: Example) -> str:
    turns = [f"{message['role']}\n{message['content']}" for message in example.messages]
    return "\n".join([*turns, f"assistant\n{example.answer}"])
