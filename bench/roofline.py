"""Draw measured steps under the two ceilings of their GPU, as an SVG.

Across: operations for each byte that a step must read. Up: operations per second that it reached.
The ceilings are the read rate and the matrix rate of the same run.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from paceline.bench.gpu_rates import Rates

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 24, 48
LABEL_HEIGHT, LETTER_WIDTH = 13, 5.6
STYLE = (
    "text{font:11px sans-serif;fill:#333}.grid{stroke:#ddd}.roof{stroke:#888;fill:none;"
    "stroke-width:2}.decode{fill:#1769aa}.prefill{fill:#c25100}"
)


class Measured(NamedTuple):
    """One kind of step."""

    kind: str
    """decode or prefill"""
    label: str
    num_bytes: float
    flops: float
    seconds: float

    @property
    def intensity(self) -> float:
        return self.flops / self.num_bytes

    @property
    def rate(self) -> float:
        return self.flops / self.seconds


class _Axis:
    """Decades laid out between two ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low = math.floor(math.log10(min(values)))
        self.high = max(self.low + 1, math.ceil(math.log10(max(values))))
        self._start, self._scale = start, (end - start) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._start + (math.log10(value) - self.low) * self._scale

    def decades(self) -> list[float]:
        return [10.0**power for power in range(self.low, self.high + 1)]


def draw_roofline(title: str, rates: Rates, points: Sequence[Measured]) -> str:
    """Return the picture's SVG."""
    intensities = [point.intensity for point in points]
    x = _Axis([*intensities, _ridge(rates) * 4], LEFT, WIDTH - RIGHT)
    speeds = [*(point.rate for point in points), rates.matrix_flop_per_s]
    y = _Axis(speeds, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_grid(x, y),
        *_roofs(rates, x, y),
        *_marks(points, x, y),
        f'<text x="{LEFT}" y="15">{escape(title)}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">FLOP / byte read</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _ridge(rates: Rates) -> float:
    """Intensity from which on computing takes longer than reading."""
    return rates.matrix_flop_per_s / rates.read_bytes_per_s


def _grid(x: _Axis, y: _Axis) -> Iterator[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for value in x.decades():
        yield _line("grid", x(value), TOP, x(value), bottom)
        label = f'<text x="{x(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
        yield label
    for value in y.decades():
        yield _line("grid", LEFT, y(value), right, y(value))
        yield (
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{value / 1e12:g} TF/s</text>"
        )


def _roofs(rates: Rates, x: _Axis, y: _Axis) -> Iterator[str]:
    ridge, lowest = _ridge(rates), 10.0**y.low
    # From where the slope enters the picture.
    start = max(10.0**x.low, lowest / rates.read_bytes_per_s)
    corners = (
        (start, start * rates.read_bytes_per_s),
        (ridge, rates.matrix_flop_per_s),
        (10.0**x.high, rates.matrix_flop_per_s),
    )
    path = " ".join(f"{x(across):.1f},{y(up):.1f}" for across, up in corners)
    yield f'<polyline class="roof" points="{path}"/>'
    rate = f"{rates.matrix_flop_per_s / 1e12:.0f} TFLOP/s, {rates.read_bytes_per_s / 1e12:.2f} TB/s"
    yield (
        f'<text x="{x(ridge):.1f}" y="{y(rates.matrix_flop_per_s) - 7:.1f}" '
        f'text-anchor="middle">{rate}</text>'
    )


def _marks(points: Sequence[Measured], x: _Axis, y: _Axis) -> Iterator[str]:
    """Points, each label right below; one that would cover an earlier one moves down."""
    taken: list[tuple[float, float, float]] = []
    for point in sorted(points, key=lambda point: (point.intensity, point.rate)):
        across, up = x(point.intensity), y(point.rate)
        width = LETTER_WIDTH * len(point.label)
        left = across + 7 if across + 7 + width < WIDTH - RIGHT else across - 7 - width
        top = up + 14
        while any(
            abs(top - other) < LABEL_HEIGHT and left < end and begin < left + width
            for begin, end, other in taken
        ):
            top += 1
        taken.append((left, left + width, top))
        yield f'<circle class="{point.kind}" cx="{across:.1f}" cy="{up:.1f}" r="4"/>'
        yield f'<text x="{left:.1f}" y="{top:.1f}">{escape(point.label)}</text>'


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
