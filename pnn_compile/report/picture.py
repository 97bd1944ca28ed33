"""A compiled network as a small picture: what a notebook shows of it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pnn_compile.export.format import count, flops, size

if TYPE_CHECKING:
    from passes.plan.schema import Plan

__all__ = ["picture"]

_COLOURS = {"guess": "#c98500", "fine": "#0072b2", "coarse": "#00855f", "head": "#a3527f"}
_LEFT, _BAR, _ROW, _TOP = 64, 520, 26, 8
_MOST = 16
"""Stages that are drawn; of more, the first ones."""


def picture(plan: Plan) -> str:
    """Return HTML without scripts: a bar a stage, its guess before and its correction after it.

    Stages start together, at the left. A correction stands where its turn comes in a chain that
    waits for the slowest stage, or beside the others in a collapsed sweep.
    """
    drawn = plan.stages[:_MOST]
    guesses = [stage.preprocess.flops if stage.preprocess else 0 for stage in plan.stages]
    coarse = [stage.coarse.flops if stage.coarse else 0 for stage in plan.stages]
    ready = max(g + stage.flops for g, stage in zip(guesses, plan.stages, strict=True))
    sweep = max(coarse) if plan.sweep == "collapsed" else sum(coarse)
    scale = _BAR / ((ready + sweep + plan.head.flops) or 1)
    parts: list[str] = []
    turn = float(ready)
    for number, stage in enumerate(drawn):
        y = _TOP + number * _ROW
        span = f"{stage.first_module or stage.first} .. {stage.last_module or stage.last}"
        parts.append(_text(f"stage {number}", y))
        parts.append(_bar("guess", 0, guesses[number], y, scale, f"guess of stage {number}"))
        cost = f"stage {number}: {span}, {count(stage.flops)} FLOPs"
        parts.append(_bar("fine", guesses[number], stage.flops, y, scale, cost))
        parts.append(_bar("coarse", turn, coarse[number], y, scale, f"correction {number}"))
        if plan.sweep == "chain":
            turn += coarse[number]
    y = _TOP + len(drawn) * _ROW
    parts.append(_text("head", y))
    start = ready + sweep
    parts.append(_bar("head", start, plan.head.flops, y, scale, f"head: {flops(plan.head.flops)}"))
    height = y + _ROW + 4
    width = _LEFT + _BAR + 10
    more = f", {len(plan.stages) - _MOST} more not drawn" if len(plan.stages) > _MOST else ""
    crossing = max(face.bytes for face in plan.interfaces)
    known = plan.forecast
    caption = (
        f"{len(plan.stages)} stages{more}, {plan.correction} form, {plan.sweep} sweep, "
        f"K = {plan.iterations}; speed-up {known.speedup:.2f} predicted by {known.unit}, bound "
        f"{known.bound:.2f}; at most {size(crossing)} cross a cut"
    )
    return (
        f'<div style="font-family: sans-serif; font-size: 13px"><b>{escape(plan.model)}</b><br>'
        f"{escape(caption)}"
        f'<svg role="img" aria-label="{escape(caption)}" viewBox="0 0 {width} {height}" '
        f'style="display: block; width: 100%; max-width: {width}px" fill="currentColor">'
        f"{''.join(parts)}</svg></div>"
    )


def _text(text: str, y: float) -> str:
    return (
        f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end" font-size="12">{escape(text)}</text>'
    )


def _bar(role: str, start: float, cost: float, y: float, scale: float, title: str) -> str:
    if not cost:
        return ""
    width = max(1.0, cost * scale)
    return (
        f'<rect x="{_LEFT + start * scale:.1f}" y="{y + 3}" width="{width:.1f}" height="17" '
        f'fill="{_COLOURS[role]}"><title>{escape(title)}</title></rect>'
    )
