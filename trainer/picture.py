"""RUN/curves.svg, which RUN/README.md shows: training loss, validation loss, learning rate.

Written by hand: no package is needed, dark pages get a style of their own, and it takes a
millisecond of Python's lock (matplotlib: 70), which the training thread needs, too.
"""

import contextlib
import math
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from statistics import fmean

from pipeline.files import write_whole
from trainer.report import PICTURE_FILE, Row, amount

MAX_POINTS = 600  # of a curve, however long the run
START_FRACTION = 0.02  # of the tokens: the first losses, of 11 nats, would flatten all that follows
WIDTH, HEIGHT, LEFT, RIGHT = 860, 456, 64, 836  # pixels
LOSS_PANEL, RATE_PANEL = (72, 304), (340, 408)  # top and bottom
STYLE = """<style>
text { font: 13px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; fill: #666a72; }
.legend { font-size: 14px; fill: #1c1e22; } .end { text-anchor: end; }
.middle { text-anchor: middle; }
.paper { fill: #fcfcfa; } .grid { stroke: #e4e3de; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.training { stroke: #0069b4; } .validation { stroke: #cc4e00; } .rate { stroke: #00805c; }
@media (prefers-color-scheme: dark) {
text { fill: #9a9ea6; } .legend { fill: #e8e7e3; }
.paper { fill: #15171a; } .grid { stroke: #2d3035; }
.training { stroke: #5fb2f2; } .validation { stroke: #ff9558; } .rate { stroke: #40cc9f; }
}</style>"""
Point = tuple[float, float]  # tokens, value


class Curve:
    """At most MAX_POINTS points, each the mean of `width` neighbours."""

    def __init__(self) -> None:
        self.points, self.waiting, self.width = list[Point](), list[Point](), 1

    def add(self, tokens: int, value: float | None) -> None:
        """Add a row's value, unless it is not finite, or None, which metrics.jsonl has for that."""
        if value is None or not math.isfinite(value):
            return
        self.waiting.append((tokens, value))
        if len(self.waiting) == self.width:
            self.points.append(mean(self.waiting))
            self.waiting = []
        if len(self.points) == MAX_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self.width = [mean(pair) for pair in pairs], 2 * self.width


def mean(points: Iterable[Point]) -> Point:
    tokens, values = zip(*points, strict=True)
    return fmean(tokens), fmean(values)


class Picture:
    """A watcher that draws at each evaluation, in the thread of `pool`."""

    def __init__(self, run: Path, past: Iterable[Row], pool: Executor) -> None:
        self.path, self.pool = run / PICTURE_FILE, pool
        self.curves = {"training": Curve(), "validation": Curve(), "rate": Curve()}
        for row in past:
            self.note(row)

    def note(self, row: Row) -> None:
        if row["kind"] == "step":
            self.curves["training"].add(row["tokens"], row.get("loss"))
            self.curves["rate"].add(row["tokens"], row.get("lr"))
        elif row["kind"] == "evaluate":
            self.curves["validation"].add(row["tokens"], row.get("loss"))

    def __call__(self, row: Row) -> None:
        self.note(row)
        if row["kind"] == "evaluate":
            self.pool.submit(self.write, *(list(curve.points) for curve in self.curves.values()))

    def write(self, *curves: list[Point]) -> None:
        with contextlib.suppress(OSError):  # README.md, written at the same time, warns
            write_whole(self.path, draw(*curves).encode(), wait_for_disk=False)


def draw(training: list[Point], validation: list[Point], rate: list[Point]) -> str:
    """The picture as SVG. All axes are linear; the loss before START_FRACTION is cut off."""
    losses = {"training": training, "validation": validation}
    end = max((tokens for tokens, _ in training + validation), default=0)
    shown = [loss for tokens, loss in training + validation if tokens >= START_FRACTION * end]
    low, high = min(shown, default=0), max(shown, default=1)
    margin = 0.04 * (high - low) or 0.5
    peak, end = max((value for _, value in rate), default=0) or 1, end or 1
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">',
        f'{STYLE}<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text x="{LEFT}" y="{LOSS_PANEL[0] - 10}">Loss, in nats a token</text>',
        f'<text x="{LEFT}" y="{RATE_PANEL[0] - 10}">Learning rate</text>',
        f'<text class="end" x="{RIGHT}" y="{HEIGHT - 10}">Tokens</text>',
    ]
    names = ("training loss {:.3f}", "validation loss {:.3f}", "learning rate {:.2g}")
    for n, (kind, points) in enumerate((losses | {"rate": rate}).items()):
        x, name = LEFT + 220 * n, names[n].format(points[-1][1] if points else math.nan)
        parts.append(f'<path class="curve {kind}" d="M{x + 1} 24h18"/>')
        parts.append(f'<text class="legend" x="{x + 28}" y="29">{name}</text>')
    for tokens in ticks(0, end, 6):
        x = round(LEFT + (RIGHT - LEFT) * tokens / end)
        for top, bottom in (LOSS_PANEL, RATE_PANEL):
            parts.append(f'<path class="grid" d="M{x} {top}V{bottom}"/>')
        label = f'<text class="middle" x="{x}" y="{RATE_PANEL[1] + 18}">{amount(round(tokens))}'
        parts.append(f"{label}</text>")
    parts += panel(losses, end, (low - margin, high + margin), LOSS_PANEL)
    return "\n".join([*parts, *panel({"rate": rate}, end, (0, 1.1 * peak), RATE_PANEL), "</svg>\n"])


def panel(
    curves: dict[str, list[Point]], end: float, between: Point, edges: tuple[int, int]
) -> list[str]:
    """Curves of values `between` two, from 0 to `end` tokens, and the grid behind them."""
    (low, high), (top, bottom), width = between, edges, RIGHT - LEFT
    parts = []
    for value in ticks(low, high, 3 + (bottom - top) / 64):
        y = round(bottom - (bottom - top) * (value - low) / (high - low))
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4}">{value:.6g}</text>')
    # An inner svg cuts off what lies outside.
    parts.append(f'<svg x="{LEFT}" y="{top}" width="{width}" height="{bottom - top}">')
    for kind, points in curves.items():
        places = [
            f"{width * tokens / end:.1f},{(bottom - top) * (high - value) / (high - low):.1f}"
            for tokens, value in points
        ]
        places *= 2 if len(places) == 1 else 1  # a line without length is a dot
        parts.append(f'<polyline class="curve {kind}" points="{" ".join(places)}"/>')
    return [*parts, "</svg>"]


def ticks(low: float, high: float, most: float) -> list[float]:
    """At most `most` + 1 round numbers between two."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
