"""Names beside points that do not lie on each other, or on other points."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

# Where a name may stand: how far from its point (in points), and in which direction.
_DISTANCES = (4, 9, 15, 22, 30, 40)
_DIRECTIONS = [(np.cos(angle), np.sin(angle)) for angle in np.arange(0, 2 * np.pi, np.pi / 6)]
_POINT = 3.0  # half of what a point takes, in points
_NEAR = 12  # a name further off has a line to its point
_PADDING = 1.02


def name_points(axis: Axes, points: NDArray[Any], names: Sequence[str], **look: Any) -> None:
    """Put names beside points of a panel whose layout is settled.

    One after another, those in the densest places first, each goes where it covers least of what
    is there; of such places, to the nearest.

    Args:
        axis: the panel; what it shows does not change any more.
        points: [point, 2], in the panel's units.
        names: one for each point.
        look: of the texts.
    """
    figure: Any = axis.figure
    figure.draw_without_rendering()
    scale = figure.dpi / 72
    at = axis.transData.transform(points)
    half = _POINT * scale
    taken = [Bbox.from_extents(*(xy - half), *(xy + half)) for xy in at]
    frame = axis.get_window_extent()
    crowd = [np.sort(np.linalg.norm(at - xy, axis=1))[:4].sum() for xy in at]
    for k in map(int, np.argsort(crowd)):
        point = (float(points[k, 0]), float(points[k, 1]))
        text = axis.annotate(names[k], point, (0, 0), textcoords="offset points", **look)
        text.set_in_layout(False)  # what it takes up must not move the panel
        size = text.get_window_extent()
        options = [
            (_box(at[k], size, distance * scale, direction), distance, direction)
            for distance, direction in product(_DISTANCES, _DIRECTIONS)
        ]
        others = [box for j, box in enumerate(taken) if j != k]
        box, distance, direction = min(options, key=lambda each: _cost(each[0], others, frame))
        taken.append(box)
        _move(text, (box.x0 - at[k][0]) / scale, (box.y0 - at[k][1]) / scale)
        if distance > _NEAR:
            end = (direction[0] * distance, direction[1] * distance)
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
            drawn = axis.annotate("", point, end, textcoords="offset points", arrowprops=line)
            drawn.set_in_layout(False)


def _box(point: NDArray[Any], size: Bbox, distance: float, direction: tuple[float, float]) -> Bbox:
    """Where a text lies that begins at a distance from its point, in pixels."""
    width, height = size.width * _PADDING, size.height * _PADDING
    x = point[0] + distance * direction[0] - width * (1 - direction[0]) / 2
    y = point[1] + distance * direction[1] - height * (1 - direction[1]) / 2
    return Bbox.from_bounds(x, y, width, height)


def _cost(box: Bbox, others: Sequence[Bbox], frame: Bbox) -> float:
    """How much of other boxes, and of what is outside the panel, a box covers."""
    covered = sum(_overlap(box, other) for other in others)
    return covered + 3 * (box.width * box.height - _overlap(box, frame))


def _overlap(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def _move(text: Annotation, x: float, y: float) -> None:
    text.set_position((x, y))
    text.set(ha="left", va="bottom")
