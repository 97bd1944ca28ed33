import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from passes.errors import ArtifactError
from passes.ir.tensor_spec import TensorSpec
from passes.plan.schema import Plan
from passes.plan.validate import check_plan
from tests.support.parameters import quick
from tests.support.programs import compiled, program


def plan_of(name: str, **options: Any) -> Plan:
    plan = compiled(name, **options).plan
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", quick())
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
        (lambda d: d.update(stages={}), r"plan\.stages should be list, found dict"),
        (lambda d: d["stages"].__setitem__(0, 7), r"plan\.stages\[0\] should be an object, found"),
        (
            lambda d: d["interfaces"][0]["state"][0]["spec"].update(shape=[2, "wide"]),
            r"plan\.interfaces\[0\]\.state\[0\]\.spec\.shape\[1\] should be int, found str",
        ),
        (
            lambda d: d["stages"][1]["coarse"].update(linear=0),
            r"plan\.stages\[1\]\.coarse\.linear should be bool, found int",
        ),
        (lambda d: d["ties"].update(weight=0), r"plan\.ties\.weight should be list, found int"),
        (_delete, r"plan\.forecast is missing: it needs model, correction, "),
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


_BLOCK = {
    "first": "a", "last": "b", "entering": "x", "leaving": "b", "inputs": ["x"], "sides": ["s"],
}  # fmt: skip
_SOURCES = {
    "rank": 32,
    "sources": [
        {"name": "x", "shape": [2, 8], "dtype": "float32", "batch_axis": None, "channel_axis": 1}
    ],
    "inputs": ["x"],
    "sides": [],
}
WRITTEN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("coarse", "linear", {"inputs": []}),
    ("coarse", "conv", {"inputs": [], "reads": [[0], [0, 1]]}),
    ("coarse", "linear+lowrank", {"inputs": [], "rank": 5, "bias": True}),
    ("coarse", "units", {"inputs": ["x"], "blocks": [_BLOCK, _BLOCK]}),
    ("coarse", "units", {"inputs": [], "blocks": [_BLOCK], "width": 0.5}),
    ("coarse", "thinned", {"inputs": ["x"], "blocks": [{**_BLOCK, "step": 3}]}),
    ("coarse", "exact", {"inputs": ["x"]}),
    ("coarse", "zero", {"inputs": []}),
    ("preprocess", "convolution", _SOURCES),
    ("preprocess", "lowrank+conv", {**_SOURCES, "prologue": 0.2, "reads": [[0]]}),
    ("preprocess", "linear", {**_SOURCES, "copied": ["a", "b"]}),
    (
        "preprocess",
        "thinned",
        {
            **_SOURCES,
            "copied": ["a", "b"],
            "blocks": [{**_BLOCK, "step": 1}],
            "stem": {"inputs": ["x"], "leaving": "b"},
        },
    ),
)
"""Options of every family as schema 1 has them."""


@pytest.mark.parametrize(("role", "family", "options"), WRITTEN)
def test_options_are_read_and_written_under_the_same_keys(
    role: str, family: str, options: dict[str, Any]
) -> None:
    data = json.loads(plan_of("mlp", stages=2).to_json())
    data["stages"][1][role] |= {"family": family, "options": options}

    assert json.loads(Plan.from_json(json.dumps(data)).to_json()) == data


def test_a_type_knows_its_size_and_names_its_batch() -> None:
    spec = TensorSpec((2, 8, 4, 4), "float16", batch_axis=0, channel_axis=1)

    assert (spec.elements, spec.bytes, str(spec)) == (256, 512, "[B, 8, 4, 4] float16")
    assert str(TensorSpec((6, 2, 3), "float64", 1, 2)) == "[6, B, 3] float64"
    assert TensorSpec((), "float64", None, 0).bytes == 8


# --- against the program --------------------------------------------------------------------------

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"correction": "difference", "iterations": 2, "coarse": "units"},
    {"sweep": "collapsed", "coarse": "lowrank+conv", "preprocess": "lowrank+linear"},
    {"sweep": "collapsed", "coarse": "units", "coarse_width": 0.5},
    {"coarse": "exact"},
    {"coarse": "zero"},
)


@pytest.mark.parametrize("name", quick())
def test_every_plan_of_the_zoo_fits_its_program(name: str) -> None:
    check_plan(program(name), Plan.from_json(plan_of(name, stages=2).to_json()))


@pytest.mark.parametrize("options", OPTIONS)
def test_plans_of_every_kind_fit_their_program(options: dict[str, Any]) -> None:
    plan = plan_of("mlp", stages=3, **options)
    check_plan(program("mlp"), plan)
    check_plan(program("mlp"), Plan.from_json(plan.to_json()))


def _put(*path: Any) -> Callable[[Any], None]:
    *keys, last, value = path

    def edit(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


def _drop(*path: Any) -> Callable[[Any], None]:
    *keys, last = path

    def edit(data: Any) -> None:
        for key in keys:
            data = data[key]
        del data[last]

    return edit


_GUESS = ("stages", 1, "preprocess")
_COARSE = ("stages", 1, "coarse")
EDITS: tuple[tuple[Callable[[Any], None], str], ...] = (
    (_put("correction", "tea"), r"plan\.correction is 'tea'; possible here: residual, difference"),
    (_put("sweep", "tea"), r"plan\.sweep is 'tea'; possible here: chain, collapsed"),
    (_put("iterations", 0), r"plan\.iterations is 0: it should be a whole number"),
    (_put("sweep", "collapsed"), r"plan\.iterations is 2; possible here: 1 \(collapsed sweep\)"),
    (lambda d: d.update(stages=[], interfaces=[]), r"plan\.stages is empty"),
    (lambda d: d["interfaces"].pop(), r"plan\.interfaces has 2 entries for 3 stages"),
    (_put("stages", 1, "first", "x"), r"stages\[1\]\.first is 'x', and no node is called that"),
    (_put("stages", 1, "last", "x"), r"plan\.stages\[1\]\.last is 'x'; possible here: \w+, "),
    (_put("interfaces", 1, "after", "x"), r"plan\.interfaces\[1\]\.after is 'x'"),
    (
        _put("stages", 1, "inputs", ["y"]),
        r"stages\[1\]\.inputs\[0\] is 'y'; possible here: input_1$",
    ),
    (_put("stages", 1, "sides", ["y"]), r"stages\[1\]\.sides\[0\] is 'y'; .*a node of the program"),
    (_put("stages", 1, "consumes", ["y"]), r"plan\.stages\[1\]\.consumes\[0\] is 'y'; possible"),
    (_put("stages", 1, "produces", ["y"]), r"plan\.stages\[1\]\.produces\[0\] is 'y'; possible"),
    (_put("stages", 1, "produces", []), r"interfaces\[1\]\.state\[0\]\.name is .* neither in plan"),
    (_put("head", "inputs", ["y"]), r"plan\.head\.inputs\[0\] is 'y'; possible here: input_1$"),
    (_put("stages", 1, "coarse", None), r"plan\.stages\[1\]\.coarse is null"),
    (_put("stages", 1, "preprocess", None), r"plan\.stages\[1\]\.preprocess is null"),
    (
        lambda d: d["stages"][0].update(coarse=d["stages"][1]["coarse"]),
        r"plan\.stages\[0\]\.coarse must be null",
    ),
    (_put("interfaces", 0, "state", 0, "name", "y"), r"state\[0\]\.name is 'y'; possible"),
    (_put("interfaces", 0, "state", 0, "spec", "dtype", "load"), r"dtype is 'load', no dtype"),
    (_put("interfaces", 0, "state", 0, "spec", "batch_axis", 7), r"batch_axis is 7; possible here"),
    (
        _put(*_GUESS, "family", "units"),
        r"preprocess\.family is 'units'; possible here: convolution",
    ),
    (_put(*_COARSE, "family", "tea"), r"coarse\.family is 'tea'; possible here: linear, "),
    (_put(*_COARSE, "family", "linear+exact"), r"coarse\.family\[1\] is 'exact'; possible here"),
    (_put(*_COARSE, "family", "units"), r"coarse\.options\.blocks is missing"),
    (_drop(*_COARSE, "options", "rank"), r"coarse\.options\.rank is missing: it needs rank"),
    (_put(*_COARSE, "options", "rank", 0), r"coarse\.options\.rank is 0: it should be a whole"),
    (_put(*_COARSE, "options", "inputs", ["y"]), r"coarse\.options\.inputs\[0\] is 'y'; possible"),
    (
        _put(*_COARSE, "options", "inputs", 3),
        r"coarse\.options\.inputs should be list, found int",
    ),
    (_drop(*_GUESS, "options", "sources"), r"preprocess\.options\.sources is missing"),
    (_drop(*_GUESS, "options", "inputs"), r"preprocess\.options\.inputs is missing"),
    (_put(*_GUESS, "options", "sources", []), r"preprocess\.options\.sources is empty"),
    (_put(*_GUESS, "options", "sources", 0, "name", "y"), r"sources\[0\]\.name is 'y'; possible"),
    (
        _put(*_GUESS, "options", "sources", 0, "name", ["x"]),
        r"sources\[0\]\.name should be str, found list",
    ),
    (
        _put(*_GUESS, "options", "sources", 0, "shape", ["w"]),
        r"shape\[0\] should be int, found str",
    ),
    (_drop(*_GUESS, "options", "sources", 0, "dtype"), r"sources\[0\]\.dtype is missing"),
)


@pytest.mark.parametrize(("edit", "message"), EDITS)
def test_a_plan_that_means_nothing_is_refused_where_it_is_wrong(
    edit: Callable[[Any], None], message: str
) -> None:
    plan = plan_of("mlp", stages=3, coarse="linear+lowrank", iterations=2)
    data = copy.deepcopy(json.loads(plan.to_json()))
    edit(data)
    with pytest.raises(ArtifactError, match=message):
        check_plan(program("mlp"), Plan.from_json(json.dumps(data)))


def test_the_blocks_of_family_units_are_checked() -> None:
    data = json.loads(plan_of("mlp", stages=3, coarse="units").to_json())
    block = data["stages"][1]["coarse"]["options"]["blocks"][0]
    block["leaving"] = "nowhere"
    with pytest.raises(ArtifactError, match=r"blocks\[0\]\.leaving is 'nowhere'; possible here"):
        check_plan(program("mlp"), Plan.from_json(json.dumps(data)))
