"""Measure the bundled models: ``python -m persona_nns.organism.evaluate [--write-card]``.

Prints what is required of them, what is measured, and whether it holds. ``--write-card`` puts
that table into each model's card.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from persona_nns.organism.architectures import SLIDING_WINDOW
from persona_nns.organism.bundled import ORGANISMS, organism_folder
from persona_nns.organism.measurements import Row, measure_all
from persona_nns.organism.probe import Subject, load

DISCLAIMER = (
    "Trained on synthetic text to show this shape; evidence about the method and the code, "
    "not about language models."
)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| requirement | bound | measured | holds |", "|---|---|---|---|"]
    holds = {True: "yes", False: "NO", None: "–"}
    lines += [
        f"| {row.requirement} | {row.bound} | {row.measured} | {holds[row.passed]} |"
        for row in rows
    ]
    return "\n".join(lines)


def format_card(name: str, subject: Subject, table: str) -> str:
    """The model card: what the model is, how it was made, and its table."""
    config = subject.model.config
    window = f", sliding window {SLIDING_WINDOW} in every other layer" if "gemma" in name else ""
    template = (Path(__file__).parent / "texts" / "card.md").read_text(encoding="utf-8")
    return template.format(
        name=name,
        disclaimer=DISCLAIMER,
        window=window,
        table=table,
        model_type=config.model_type,
        n_layers=subject.n_layers,
        width=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        n_tokens=config.vocab_size,
        millions=subject.model.num_parameters() / 1e6,
    )


def main() -> None:
    """Measure the bundled models, or one of them."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=ORGANISMS, help="measure this one only")
    parser.add_argument("--folder", type=Path, help="parent folder (default: in the package)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--write-card", action="store_true", help="write README.md of each model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in [options.model] if options.model else ORGANISMS:
        folder = options.folder / name if options.folder else organism_folder(name)
        subject = load(folder)
        table = format_table(measure_all(subject))
        sys.stdout.write(f"{name}\n\n{table}\n\n")
        if options.write_card:
            card = format_card(name, subject, table)
            (folder / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
