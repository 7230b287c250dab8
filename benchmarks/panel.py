"""Axes, lines and labels of figures that are drawn as SVG: the same text wherever they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

HEIGHT, PANEL, TOP, BOTTOM = 340, 340, 52, 52


@dataclass
class Panel:
    """Axes of one plot: logarithmic in x if `log_x`, and in y if `log`. What is drawn is collected in `parts`.

    Args:
        left: where the plot begins.
        x, y: the ends of the axes.
        width: of the plot.
    """

    left: int
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = True
    log_x: bool = True
    width: int = PANEL
    parts: list[str] = field(default_factory=list)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data is in the picture."""
        across, up = _share(x, self.x, self.log_x), _share(y, self.y, self.log)
        return round(self.left + across * self.width, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    def line(self, points: Sequence[tuple[float, float]], color: str, style: str = "") -> None:
        self.parts.append(
            f'<polyline points="{self._placed(points)}" fill="none" stroke="{color}" stroke-width="2"{style}/>'
        )

    def band(self, low: Sequence[tuple[float, float]], high: Sequence[tuple[float, float]], color: str) -> None:
        """The area between two lines."""
        around = self._placed([*low, *reversed(high)])
        self.parts.append(f'<polygon points="{around}" fill="{color}" fill-opacity="0.2"/>')

    def dots(self, points: Sequence[tuple[float, float]], color: str) -> None:
        for x, y in (self.place(*point) for point in points):
            self.parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')

    def label(self, x: float, y: float, text: str, color: str = "#222", style: str = "") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" fill="{color}"{style}>{escape(text)}</text>')

    def axes(self, title: str, xs: dict[float, str], ys: dict[float, str], x_name: str, y_name: str) -> None:
        bottom, middle = HEIGHT - BOTTOM, ' text-anchor="middle"'
        for value, name in ys.items():
            _, y = self.place(self.x[0], value)
            self.parts.append(f'<path d="M{self.left},{y}h{self.width}" stroke="#ddd"/>')
            self.label(self.left - 6, y + 4, name, style=' text-anchor="end"')
        for value, name in xs.items():
            x, _ = self.place(value, self.y[0])
            self.parts.append(f'<path d="M{x},{bottom}v4" stroke="#222"/>')
            self.label(x, bottom + 18, name, style=middle)
        self.parts.append(f'<path d="M{self.left},{TOP}V{bottom}H{self.left + self.width}" fill="none" stroke="#222"/>')
        self.label(self.left, TOP - 28, title, style=' font-weight="bold" font-size="14"')
        self.label(self.left, TOP - 10, y_name, "#555")
        self.label(self.left + self.width / 2, bottom + 38, x_name, "#555", middle)

    def _placed(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x},{y}" for x, y in (self.place(*point) for point in points))


def _share(value: float, ends: tuple[float, float], log: bool) -> float:
    """How far a value is from the first of the ends, as a share of the way to the second."""
    scale: Callable[[float], float] = math.log if log else float
    return (scale(value) - scale(ends[0])) / (scale(ends[1]) - scale(ends[0]))


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """A figure on a white ground."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12">'
    )
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, ground, *parts, "</svg>"]) + "\n"
