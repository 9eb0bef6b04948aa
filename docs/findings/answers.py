"""Answers in a store as rows of a file: ``python docs/findings/answers.py STORE TRAIT FOLDER``.

Nobody judges them: what `trait_responses` was told under "pos" and "neg" instructions is what
`trait_vectors` and `trait_steering` are given. The vector is of the extraction questions; what is
scored under steering are answers to the evaluation questions, under the first instruction.
"""

import json
import sys
from pathlib import Path

import persona_nns as pn
from persona_nns.results import read_attribute


def write_answers(store: str, trait: str, folder: Path) -> None:
    """Write ``{split}/{trait}.jsonl`` for both splits."""
    for split, n_pairs in (("extraction", 5), ("evaluation", 1)):
        run = f"{trait}-{split}"
        results = pn.open_results(store, "trait_responses", run=run).isel(model=0, trait=0)
        systems = read_attribute(results, "systems")
        rows = [
            {
                "pair": pair,
                "question_id": question,
                "label": label,
                "system": systems[pair][number],
                "question": str(results.question_text.sel(question=question).item()),
                "response": said,
            }
            for question in results.question.values.tolist()
            for pair in results.pair.values[:n_pairs].tolist()
            for number, label in enumerate(results.label.values.tolist())
            if (said := str(results.response.sel(question=question, pair=pair, label=label).item()))
        ]
        file = folder / split / f"{trait}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_answers(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
