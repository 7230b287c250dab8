"""The smallest value of a function of one positive number, whose values may cost much."""

from __future__ import annotations

import math
from collections.abc import Callable

GOLDEN = (math.sqrt(5) - 1) / 2


def minimize(function: Callable[[float], float], low: float, high: float, points: int, tolerance: float) -> float:
    """Returns where a function of a positive number is smallest, among all that were tried.

    The logarithm of the number is searched: first at equal distances, then by golden section between the neighbors of
    the smallest, where the function is taken to have one minimum.

    Args:
        function: the function; it may be infinite, and NaN counts as that.
        low, high: the ends, which are tried, too.
        points: the number of points of the first search, 3 or more.
        tolerance: the relative error at which the second search ends.

    Raises:
        ValueError: the function is finite nowhere.

    Example:
        >>> round(minimize(lambda x: (x - 2) ** 2, 0.1, 10, 9, 1e-6), 5)
        2.0
    """
    values: dict[float, float] = {}

    def value(place: float) -> float:
        if place not in values:
            found = function(math.exp(place))
            values[place] = math.inf if math.isnan(found) else found
        return values[place]

    first, last = math.log(low), math.log(high)
    grid = [first + (last - first) * i / (points - 1) for i in range(points)]
    best = min(range(points), key=lambda i: (value(grid[i]), abs(grid[i])))
    if value(grid[best]) == math.inf:
        raise ValueError("the likelihood of the targets is 0 wherever it was looked at")
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    while right - left > tolerance:
        inner, outer = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
        if value(inner) <= value(outer):
            right = outer
        else:
            left = inner
    return math.exp(min(values, key=lambda place: (values[place], abs(place))))
