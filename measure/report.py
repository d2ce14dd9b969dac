"""What was measured as JSON, and as a page with plots that needs nothing from outside."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .footage import Footage, Speaker
from .quantities import OF_SPEAKERS, OF_VIDEOS, Absent, Quantity, Value, measured
from .sync import RATE, SHIFTS, in_band

__all__ = ["as_json", "as_page", "rows", "shown"]

Floats = NDArray[np.float64]

UNCERTAIN = "Calibrated on drawn faces. No real talking video was measured."


def rows(footage: Footage) -> Iterator[tuple[str, list[tuple[str, Quantity, Value]]]]:
    """Heading, and under it each quantity by name and its value."""
    of_video, of_speakers = measured(footage)
    for number, values in enumerate(of_speakers, 1):
        heading = "speaker" if len(of_speakers) == 1 else f"speaker {number}, from the left"
        yield heading, [(name, OF_SPEAKERS[name], value) for name, value in values.items()]
    yield "video", [(name, OF_VIDEOS[name], value) for name, value in of_video.items()]


def shown(quantity: Quantity, value: Value) -> str:
    """A value with its unit, or the reason why there is none."""
    if isinstance(value, Absent):
        return value.reason
    digits = 2 if quantity.unit == "" else 1
    number = f"{value:.0f}" if value == round(value) and quantity.unit in ("", "ms") else f"{value:.{digits}f}"
    return f"{number} {quantity.unit}".rstrip()


def as_json(footage: Footage) -> dict[str, Any]:
    """Everything that was measured; where there is no number, `value` is None and `reason` says why."""
    of_video, of_speakers = measured(footage)

    def entry(quantity: Quantity, value: Value) -> dict[str, Any]:
        if isinstance(value, Absent):
            return {"value": None, "unit": quantity.unit, "reason": value.reason}
        return {"value": round(value, 4), "unit": quantity.unit}

    def entries(table: dict[str, Quantity], values: dict[str, Value]) -> dict[str, Any]:
        return {name: entry(table[name], value) for name, value in values.items()}

    return {
        "video": footage.name,
        "frames": footage.frames,
        "fps": round(footage.fps, 3),
        "width": footage.width,
        "height": footage.height,
        "faces_by": footage.how,
        "uneven_times": footage.uneven,
        "no_face": footage.no_face or None,
        "speakers": [
            {"face": [round(side, 1) for side in speaker.face.box]} | entries(OF_SPEAKERS, values)
            for speaker, values in zip(footage.speakers, of_speakers, strict=True)
        ],
        "whole": entries(OF_VIDEOS, of_video),
    }


# ----------------------------------------------------------------------------------------------------------------- page

WIDTH, HEIGHT, LEFT = 900, 150, 56
"""Pixels of a plot, and of its axis' numbers."""

COLORS = ("#1769aa", "#c2410c", "#3f7d20")
"""Of the lines in a plot."""

POINTS = 1800
"""Of a line at most; of more, the largest and smallest of each stretch are drawn."""

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:60em;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;padding:.25em .8em .25em 0;border-bottom:1px solid #ddd;vertical-align:top}"
    "td.absent{color:#777}svg{width:100%;height:auto;display:block}figure{margin:1.2em 0}"
    "text{font:12px system-ui,sans-serif;fill:#555}h2{margin-top:1.6em}"
)


def as_page(footage: Footage) -> str:
    """An HTML page: the table, and how mouth, identity, colors and changes run over time."""
    title = f"Measure of {footage.name}"
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(summary(footage))}</p>"]
    for heading, entries in rows(footage):
        lines = "".join(_row(*entry) for entry in entries)
        head = "<tr><th>name</th><th>what</th><th>measured</th><th>good</th></tr>"
        parts.append(f"<h2>{html.escape(heading.capitalize())}</h2><table>{head}{lines}</table>")
    for number, speaker in enumerate(footage.speakers, 1):
        parts += _speaker_plots(footage, speaker, f"speaker {number}" if len(footage.speakers) > 1 else "the speaker")
    parts += _video_plots(footage)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def summary(footage: Footage) -> str:
    """What was read and how faces were found, in a line."""
    size = f"{footage.frames} frames of {footage.width} x {footage.height}, {footage.seconds:.1f} s"
    return f"{size}. Faces by {footage.how}. {UNCERTAIN}"


def _row(name: str, quantity: Quantity, value: Value) -> str:
    kind = ' class="absent"' if isinstance(value, Absent) else ""
    cells = f"<td><code>{name}</code></td><td>{html.escape(quantity.title)}</td>"
    return f"<tr>{cells}<td{kind}>{html.escape(shown(quantity, value))}</td><td>{html.escape(quantity.good)}</td></tr>"


def _speaker_plots(footage: Footage, speaker: Speaker, who: str) -> list[str]:
    times = _times(footage)
    plots = [_plot(f"Opening of the mouth of {who}, {speaker.face.unit}", times, {"opening": speaker.opening})]
    if speaker.curve is not None and speaker.loud is not None:
        count = min(int(footage.seconds * RATE), len(speaker.loud))
        at = np.arange(count) / RATE
        pair = {
            "mouth": in_band(np.interp(at, times, speaker.opening)),
            "loudness of the speech": in_band(speaker.loud[:count]),
        }
        scaled = {name: line / max(float(np.abs(line).max()), 1e-9) for name, line in pair.items()}
        plots.append(_plot(f"Mouth of {who} and speech between 1 and 10 Hz, each of its largest", at, scaled))
        title = f"Correlation of {who} with the speech, by how much the mouth comes after it"
        plots.append(_plot(title, SHIFTS * 1000.0, {"correlation": speaker.curve.values}, "ms"))
    errors = {name: _psnr(np.array(values)) for name, values in speaker.face.errors.items()}
    errors = {name: values for name, values in errors.items() if np.isfinite(values).any()}
    if errors:
        plots.append(_plot(f"Likeness of {who} to the reference, dB", times, errors))
    return plots


def _video_plots(footage: Footage) -> list[str]:
    times = _times(footage)
    joins = [join / footage.fps for join in footage.joins or ()]
    moved = footage.colors - footage.colors[0]
    plots = [
        _plot(
            "Change from frame to frame, of 255 gray levels", times[1:], {"change": 255 * footage.change}, marks=joins
        ),
        _plot("Mean color since the first frame, L*a*b*", times, dict(zip("Lab", moved.T, strict=True)), marks=joins),
        _plot("Sharpness, mean absolute Laplacian", times, {"sharpness": footage.sharpness}, marks=joins),
    ]
    if np.isfinite(footage.background).any():
        likeness = {"background": _psnr(footage.background)}
        plots.append(_plot("Likeness of the background to the reference, dB", times, likeness, marks=joins))
    return plots


def _times(footage: Footage) -> Floats:
    """Seconds of the middle of each frame."""
    return np.linspace(0.5, footage.frames - 0.5, footage.frames) / footage.fps


def _psnr(errors: Floats) -> Floats:
    result: Floats = -10 * np.log10(np.maximum(errors, 1e-6))  # 60 dB: a plot's other values stay visible
    return result


def _plot(title: str, x: Floats, lines: dict[str, Floats], unit: str = "s", marks: Sequence[float] = ()) -> str:
    """A figure with one line for each of `lines`, and vertical marks."""
    finite = np.concatenate([line[np.isfinite(line)] for line in lines.values()])
    low, high = float(finite.min()), float(finite.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    first, last = float(x[0]), float(x[-1])

    def across(value: float) -> float:
        return LEFT + (value - first) / max(last - first, 1e-9) * (WIDTH - LEFT - 4)

    def up(value: float) -> float:
        return 4 + (high - value) / (high - low) * (HEIGHT - 24)

    drawn = [
        f'<line x1="{LEFT}" y1="{up(value):.1f}" x2="{WIDTH}" y2="{up(value):.1f}" stroke="#ddd"/>'
        f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in (low, (low + high) / 2, high)
    ]
    drawn += [
        f'<text x="{across(value):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{value:.3g} {unit}</text>'
        for value, anchor in ((first, "start"), ((first + last) / 2, "middle"), (last, "end"))
    ]
    drawn += [
        f'<line x1="{across(at):.1f}" y1="4" x2="{across(at):.1f}" y2="{HEIGHT - 20}" stroke="#999" '
        'stroke-dasharray="3 3"/>'
        for at in marks
    ]
    names = []
    for color, (name, line) in zip(COLORS, lines.items(), strict=False):
        for piece in _pieces(*_thinned(x, line)):
            points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in piece)
            drawn.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.3"/>')
        names.append(f'<span style="color:{color}">{html.escape(name)}</span>')
    legend = f" ({', '.join(names)})" if len(lines) > 1 else ""
    dashed = " Dashed: joins." if marks else ""
    caption = f"<figcaption>{html.escape(title)}{legend}.{dashed}</figcaption>"
    return f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(drawn)}</svg></figure>'


def _thinned(x: Floats, line: Floats) -> tuple[Floats, Floats]:
    each = -(-len(line) * 2 // POINTS)
    if each <= 2:
        return x, line
    kept: list[int] = []
    for begin in range(0, len(line), each):
        part = line[begin : begin + each]
        if np.isfinite(part).any():
            kept += sorted({begin + int(np.nanargmin(part)), begin + int(np.nanargmax(part))})
        else:
            kept.append(begin)
    return x[kept], line[kept]


def _pieces(x: Floats, line: Floats) -> Iterator[list[tuple[float, float]]]:
    """Stretches of a line without a gap."""
    piece: list[tuple[float, float]] = []
    for a, b in zip(x, line, strict=True):
        if np.isfinite(b):
            piece.append((float(a), float(b)))
        elif piece:
            yield piece
            piece = []
    if piece:
        yield piece
