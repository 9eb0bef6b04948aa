"""The card of a dataset that holds a store: what is in it, and how to open it."""

from collections.abc import Sequence

from persona_nns.results.reading import RunInfo

_CARD = """---
pretty_name: {name}
viewer: false
tags:
- persona-nns
- interpretability
---
# {name}
Results of persona experiments on language models, as labelled arrays in one Zarr store.
```python
# pip install persona-nns
import persona_nns as pn
ds = pn.open_results("{address}", "{experiment}")
```
`persona-nns ls {address}` lists the runs, and `persona-nns merge copy.zarr {address}` brings them
into a store here.

| experiment | model | grid | complete | version |
|---|---|---|---|---|
{rows}

Every run says what determined its numbers: prompts, token ids, checkpoint, parameters, versions of
packages. Licence: none has been stated yet; models and questions have licences of their own.
"""


def dataset_card(repo: str, address: str, runs: Sequence[RunInfo]) -> str:
    """A card for a dataset that has none.

    Args:
        repo: ``user/name``.
        address: of the store.
        runs: that it holds.
    """
    rows = [
        (
            info.experiment,
            info.attrs["model"],
            info.attrs["grid"],
            f"{info.n_completed}/{info.n_units} {info.noun}s",
            info.attrs["protocol_version"],
        )
        for info in runs
    ]
    lines = ("| " + " | ".join(_cell(each) for each in row) + " |" for row in rows)
    return _CARD.format(
        name=repo.partition("/")[2],
        address=address,
        experiment=runs[0].experiment if runs else "localized_positions",
        rows="\n".join(lines),
    )


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
