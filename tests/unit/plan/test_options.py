import dataclasses
import math
from typing import Any

import pytest

from passes.errors import OptionError
from passes.options import Options


def test_the_defaults_and_the_extremes_are_legal() -> None:
    Options()
    Options(stages=1, iterations=1, units=1, coarse_budget=1.0, cuts=(), seed=0)
    Options(stages=3, cuts=("a", "b"), cost=lambda node, flops: 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0}, r"stages must be a whole number of at least 1 \(got 0\)"),
        ({"stages": 2.0}, r"stages must be a whole number .*\(got 2.0\)"),
        ({"stages": True}, r"stages must be a whole number .*\(got True\)"),
        ({"stages": "four"}, r"stages must be a whole number .*\(got 'four'\)"),
        ({"iterations": 0}, r"iterations .*at least 1 \(got 0\)"),
        ({"units": -1}, r"units .*at least 1 \(got -1\)"),
        ({"seed": 0.5}, r"seed must be a whole number .*\(got 0.5\)"),
        ({"coarse": "quadratic"}, r"unknown coarse \('quadratic'\); choose one of: auto, linear"),
        ({"preprocess": "units"}, r"unknown preprocess \('units'\); choose one of: auto"),
        ({"correction": "sum"}, r"unknown correction \('sum'\); choose one of: residual, diff"),
        ({"sweep": "tree"}, r"unknown sweep \('tree'\); choose one of: chain, collapsed, auto"),
        ({"cost": "time"}, r"unknown cost \('time'\); choose one of: flops, measured"),
        ({"coarse_budget": 0.0}, r"coarse_budget .*\(got 0.0\)"),
        ({"coarse_budget": 1.5}, r"coarse_budget .*\(got 1.5\)"),
        ({"coarse_budget": math.nan}, r"coarse_budget .*\(got nan\)"),
        ({"coarse_budget": "5%"}, r"coarse_budget .*\(got '5%'\)"),
        ({"stages": 2, "cuts": ("a", "b")}, r"2 cuts make 3 stages, but stages is 2.* name 1 cuts"),
        ({"cuts": 3}, r"cuts must be a list of names of modules \(got 3\)"),
        ({"cuts": [3]}, r"cuts must be a list of names of modules \(got \(3,\)\)"),
        ({"devices": "h100"}, r"devices must be profiles.*\(got 'h100'\)"),
        ({"devices": 3}, r"devices must be profiles.*\(got 3\)"),
    ],
)
def test_a_bad_option_is_refused_with_its_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.of(None, options)


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().stages = 3  # type: ignore[misc]
