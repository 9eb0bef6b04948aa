"""Figures of attention knockout: how far from the clean run, how near to the host."""

import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from persona_nns.declarations.bands import band_labels, band_layers
from persona_nns.figures.style import QUARTILES, axis_label, grid_title, one_legend

_KINDS = {
    "single layer": "layer",
    "layers before k (0:k)": "k",
    "layers from k on (k:n)": "k",
}


def kl_by_band(results: xr.Dataset) -> Figure:
    """Median KL from the clean run and from the host against the band of layers.

    Args:
        results: of `attention_knockout`.

    Returns:
        The figure: two rows a model (KL from clean, KL from host), a column a kind of band, a
        colour a choice of blocked queries; dotted, the distance between the two prompts.
    """
    models = results.model.values.tolist()
    rows = [
        (model, name, gap)
        for model in models
        for name, gap in (("kl", "kl_clean_host"), ("kl_host", "kl_host_clean"))
    ]
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(11, 0.9 + 2.4 * len(rows)), dpi=150, layout="constrained")
        axes = figure.subplots(len(rows), len(_KINDS), squeeze=False, sharey="row")
        for row, (model, name, gap) in enumerate(rows):
            of_model = results.sel(model=model)
            for column, kind in enumerate(_KINDS):
                axis = axes[row, column]
                _panel(axis, of_model[name], kind, int(of_model.n_layers))
                axis.axhline(
                    float(of_model[gap].median("cell")),
                    color="0.4",
                    linestyle=":",
                    label="clean against host",
                )
                if name == "kl":
                    axis.set_title(kind if column else f"{model}: {kind}", fontsize="medium")
                axis.set_xlabel(_KINDS[kind] if name == "kl_host" else "")
                axis.set_ylabel(axis_label(results[name]) if column == 0 else "")
            axes[row, 0].set_ylim(bottom=0)  # once all columns that share the axis are drawn
        one_legend(figure, axes, "blocked queries")
        figure.suptitle(grid_title(results, "median over cells, band 25–75 %"), fontsize="medium")
    return figure


def markers_by_blocked(results: xr.Dataset) -> Figure:
    """Share of continuations with a persona marker under the knockout in all layers.

    Args:
        results: of `attention_knockout`.

    Returns:
        The figure: a bar a choice of blocked queries, a colour a model, with 95 % bootstrap
        intervals over cells.
    """
    frame = results["any_marker"].astype(float).to_dataframe().reset_index()
    order = results.blocked.values.tolist()
    with sns.axes_style("whitegrid"), sns.plotting_context("paper", font_scale=1.1):
        figure = Figure(figsize=(5.6, 3.2), dpi=150, layout="constrained")
        axis = figure.subplots()
        sns.barplot(
            frame,
            x="blocked",
            y="any_marker",
            hue="model",
            order=order,
            errorbar=("ci", 95),
            seed=0,
            palette="colorblind",
            ax=axis,
        )
        axis.set_ylim(0, 1)
        axis.set_xlabel("queries that are kept from the persona")
        axis.set_ylabel("share with a persona marker")
        axis.legend(title="model")
        figure.suptitle(grid_title(results, "all layers, interval 95 %"), fontsize="medium")
    return figure


def _panel(axis: Axes, values: xr.DataArray, kind: str, n_layers: int) -> None:
    """One kind of band: its number against the measure, a line for each choice of queries."""
    places = _places(n_layers)[kind]
    labels = list(places)
    frame = values.sel(layer_band=labels).rename("value").to_dataframe().reset_index()
    frame["place"] = [places[label] for label in frame["layer_band"]]
    order = values.blocked.values.tolist()
    frame["blocked"] = pd.Categorical(frame["blocked"], categories=order, ordered=True)
    sns.lineplot(
        frame,
        x="place",
        y="value",
        hue="blocked",
        style="blocked",
        markers=True,
        dashes=False,
        estimator="median",
        errorbar=QUARTILES,
        palette="colorblind",
        ax=axis,
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _places(n_layers: int) -> dict[str, dict[str, int]]:
    """Of each kind of band, its labels and where they stand on the axis."""
    single, first, last = ({}, {}, {})
    for label in band_labels(n_layers):
        layers = band_layers(label, n_layers)
        if len(layers) == 1:
            single[label] = layers.start
        if layers.start == 0:
            first[label] = layers.stop
        if layers.stop == n_layers:
            last[label] = layers.start
    return dict(zip(_KINDS, (single, first, last), strict=True))
