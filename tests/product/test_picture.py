"""What a notebook shows of a network."""

import dataclasses
from typing import Literal
from xml.etree import ElementTree

import pytest
import torch

import pnn_compile as pnn
from pnn_compile.report.html import picture
from tests.models.builders import linear_chain


@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_it_is_well_formed_and_stays_inside(sweep: Literal["chain", "collapsed"]) -> None:
    compiled = pnn.compile(
        linear_chain(8, 8), torch.randn(2, 8), stages=4, sweep=sweep, coarse="linear"
    )
    text = compiled._repr_html_()
    root = ElementTree.fromstring(text.replace("<br>", "<br/>"))
    (svg,) = root.iter("svg")
    width = float(svg.attrib["viewBox"].split()[2])
    bars = list(svg.iter("rect"))
    assert len(bars) == 4 + 3 + 3  # fine stages, guesses, corrections; this model has no head
    assert all(float(b.attrib["x"]) + float(b.attrib["width"]) <= width for b in bars)
    assert f"speed-up {compiled.plan.forecast.speedup:.2f}" in text


def test_names_are_text() -> None:
    compiled = pnn.compile(linear_chain(4, 8), torch.randn(2, 8), stages=2)
    plan = dataclasses.replace(compiled.plan, model="<script>alert(1)</script>")
    assert "<script" not in picture(plan)
    ElementTree.fromstring(picture(plan).replace("<br>", "<br/>"))


def test_many_stages_stay_compact() -> None:
    compiled = pnn.compile(linear_chain(24, 8), torch.randn(2, 8), stages=20)
    text = picture(compiled.plan)
    assert "4 more not drawn" in text
    assert len(text) < 20_000
