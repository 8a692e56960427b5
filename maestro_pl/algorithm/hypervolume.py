"""The volume that points dominate above a reference, and what a new point adds to it. Pure functions, exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Point: TypeAlias = tuple[float, ...]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume of the part of space that lies below at least one point and above the reference; larger is better.

    Sum of what each point adds to those after it (WFG; While, Bradstreet, Barone, IEEE TEC 16(1), 2012). Exponential in
    the number of objectives in the worst case.

    Args:
        points: K numbers each; parts of them below the reference count as lying on it.
        reference: K numbers.
    """
    front = pareto_front([tuple(map(max, point, reference)) for point in points])
    front.sort(reverse=True)
    return sum(_exclusive(point, front[place + 1 :], reference) for place, point in enumerate(front))


def hypervolume_gain(point: Point, points: Sequence[Point], reference: Point) -> float:
    """What a new point adds to the hypervolume of the others: at least 0."""
    return _exclusive(tuple(map(max, point, reference)), [tuple(map(max, p, reference)) for p in points], reference)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one equals or exceeds in every objective; equal points once, in their order."""
    unique = list(dict.fromkeys(points))
    return [p for p in unique if not any(q != p and all(a >= b for a, b in zip(q, p, strict=True)) for q in unique)]


def _exclusive(point: Point, others: Sequence[Point], reference: Point) -> float:
    """The volume below the point that is below none of the others."""
    box = math.prod(high - low for high, low in zip(point, reference, strict=True))
    if not box or not others:
        return box
    return max(0.0, box - hypervolume([tuple(map(min, point, other)) for other in others], reference))
