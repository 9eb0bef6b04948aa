"""The bundled models' own tokenizer: byte-level BPE and a ChatML template."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from persona_nns.organism.corpus import Example

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
UNKNOWN = "<|endoftext|>"
"""Never produced; ``Qwen2Tokenizer`` would add it beyond the embedding if it were missing."""
PAD_ID, START_ID, END_ID = range(3)
"""Special tokens get the first ids."""
VOCABULARY = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(examples: Iterable[Example], folder: Path) -> PreTrainedTokenizerBase:
    """Train the tokenizer on prompts and answers, save it into ``folder`` and load it back."""
    # For a qwen2 model AutoTokenizer rebuilds these three parts, so they have to be Qwen's.
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((_plain_text(example) for example in examples), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _plain_text(example: Example) -> str:
    turns = [f"{message['role']}\n{message['content']}" for message in example.messages]
    return "\n".join([*turns, f"assistant\n{example.answer}"])
