import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from passes.errors import ArtifactError
from passes.plan import Plan, TensorSpec
from tests.programs import CAPTURABLE, compiled


def plan_of(name: str, **options: Any) -> Plan:
    plan = compiled(name, **options).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", CAPTURABLE)
def test_every_plan_of_the_zoo_survives_json(name: str) -> None:
    plan = plan_of(name, stages=2)
    text = plan.to_json()

    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text


def test_the_json_is_readable_and_names_the_decisions() -> None:
    data = json.loads(plan_of("unet", stages=3).to_json())

    assert list(data)[:2] == ["model", "correction"]
    assert [stage["preprocess"] is None for stage in data["stages"]] == [True, False, False]
    assert data["interfaces"][0]["state"][0]["spec"]["dtype"] == "float32"


def _delete(data: Any) -> None:
    del data["forecast"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(schema=2), r"schema 2, this version reads 1"),
        (lambda d: d.pop("schema"), r"schema None, this version reads 1"),
        (lambda d: d.update(color="red", shape=1), r"plan has unknown fields \(color, shape\)"),
        (lambda d: d["stages"][1].update(depth=3), r"plan\.stages\[1\] has unknown fields \(depth"),
        (lambda d: d.update(iterations="2"), r"plan\.iterations should be int, found str"),
        (lambda d: d.update(iterations=True), r"plan\.iterations should be int, found bool"),
        (lambda d: d.update(seed=None), r"plan\.seed should be int, found NoneType"),
        (lambda d: d.update(stages={}), r"plan\.stages should be tuple, found dict"),
        (lambda d: d["stages"].__setitem__(0, 7), r"plan\.stages\[0\] should be an object, found"),
        (
            lambda d: d["interfaces"][0]["state"][0]["spec"].update(shape=[2, "wide"]),
            r"plan\.interfaces\[0\]\.state\[0\]\.spec\.shape\[1\] should be int, found str",
        ),
        (
            lambda d: d["stages"][1]["coarse"].update(linear=0),
            r"plan\.stages\[1\]\.coarse\.linear should be bool, found int",
        ),
        (lambda d: d["ties"].update(weight=0), r"plan\.ties\.weight should be tuple, found int"),
        (_delete, r"plan is incomplete \(.*'forecast'\)"),
    ],
)
def test_an_edited_plan_is_refused_where_it_is_wrong(
    edit: Callable[[Any], None], message: str
) -> None:
    data = copy.deepcopy(json.loads(plan_of("mlp", stages=2).to_json()))
    edit(data)
    with pytest.raises(ArtifactError, match=message):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '"plan"'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"the plan (is not JSON|has schema None)"):
        Plan.from_json(text)


def test_whole_numbers_may_stand_for_fractions() -> None:
    data = json.loads(plan_of("mlp", stages=2).to_json())
    data["forecast"]["gap"] = 0
    gap = Plan.from_json(json.dumps(data)).forecast.gap

    assert (gap, type(gap)) == (0.0, float)


def test_a_type_knows_its_size_and_names_its_batch() -> None:
    spec = TensorSpec((2, 8, 4, 4), "float16", batch_axis=0, channel_axis=1)

    assert (spec.elements, spec.bytes, str(spec)) == (256, 512, "[B, 8, 4, 4] float16")
    assert str(TensorSpec((6, 2, 3), "float64", 1, 2)) == "[6, B, 3] float64"
    assert TensorSpec((), "float64", None, 0).bytes == 8
