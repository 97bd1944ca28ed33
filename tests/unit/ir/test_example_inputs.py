from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.errors import CaptureError
from passes.ir.example_inputs import bind, placeholder_names


class Model(nn.Module):
    def forward(
        self,
        x: Tensor,
        batch: dict[str, Any] | None = None,
        *rest: Tensor,
        scale: float = 1.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        raise NotImplementedError


X, Y, Z = torch.zeros(3, 4), torch.ones(3, 4), torch.full((3,), 2.0)


def test_tensors_are_found_in_the_order_of_the_signature_with_their_paths() -> None:
    bound = bind(Model(), (X, {"a": [Y, 5], "b": None}, Z), {"scale": 2.0, "mask": Y})

    assert [(leaf.argument, leaf.path) for leaf in bound.leaves] == [
        ("x", ()),
        ("batch", ("a", 0)),
        ("rest_0", ()),
        ("mask", ()),
    ]
    assert placeholder_names(bound) == ["x", "batch", "rest_0", "mask"]
    assert list(bound.tensor_arguments()) == ["x", "batch", "rest_0", "mask"]


def test_what_is_no_tensor_is_a_constant_by_name() -> None:
    bound = bind(Model(), (X, {"a": [Y, 5]}), {"scale": 2.0})

    assert bound.constants() == {"scale": 2.0, "batch['a'][1]": 5}


def test_an_argument_may_be_given_by_name() -> None:
    bound = bind(Model(), (), {"x": X})

    assert (bound.args, [leaf.argument for leaf in bound.leaves]) == ((), ["x"])


def test_other_values_take_the_places_of_the_tensors() -> None:
    bound = bind(Model(), (X, {"a": [Y, 5]}), {"mask": Z})
    args, kwargs = bound.with_leaves(["first", "second", "third"])

    assert args == ("first", {"a": ["second", 5]})
    assert kwargs == {"mask": "third"}
    assert bound.args[0] is X


def test_a_second_call_has_other_values_and_one_more_sample() -> None:
    ids = torch.arange(6).reshape(3, 2)
    table = torch.rand(5, 4)
    bound = bind(Model(), (ids, {"z": Z, "table": table}), {"mask": torch.tensor(1.0)})
    more = bound.varied(grow=True)
    ids_more, z_more, table_more, mask_more = more.tensors()

    assert bound.batch_size == 3
    assert ids_more.shape == (4, 2)
    assert not torch.equal(ids_more[:3], ids)
    assert set(ids_more.flatten().tolist()) <= set(ids.flatten().tolist())
    assert z_more.shape == (4,)
    assert torch.equal(table_more, table)
    assert mask_more.shape == ()
    assert [leaf.argument for leaf in more.leaves] == [leaf.argument for leaf in bound.leaves]


def test_a_second_call_of_the_same_size_keeps_every_shape() -> None:
    bound = bind(Model(), (X + torch.arange(4), {"y": Y}), {})
    other = bound.varied(grow=False)

    assert [t.shape for t in other.tensors()] == [t.shape for t in bound.tensors()]
    assert not torch.equal(other.tensors()[0], bound.tensors()[0])


def test_without_a_dimension_there_is_no_batch() -> None:
    assert bind(Model(), (torch.tensor(1.0),), {}).batch_size is None


def test_inputs_that_do_not_fit_the_signature_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"do not fit Model\.forward\(x.*unexpected.*'wrong'"):
        bind(Model(), (X,), {"wrong": Y})


def test_inputs_without_a_tensor_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"inputs of Model hold no tensor: give at least one"):
        bind(Model(), (3, {"a": [4]}), {})


def test_tensors_that_share_memory_are_copied() -> None:
    model = nn.Bilinear(4, 4, 2)
    weight, whole = model.weight, torch.arange(24.0).reshape(6, 4)
    for first, second in ((X, X), (whole[:3], whole[3:]), (X, X.view(4, 3).T), (weight, X)):
        bound = bind(model, (), {"input1": first, "input2": second})
        memory = {t.untyped_storage().data_ptr() for t in (*bound.tensors(), weight)}
        assert len(memory) == 3
        assert torch.equal(bound.kwargs["input1"], first)
        assert torch.equal(bound.kwargs["input2"], second)


def test_one_tensor_alone_changes_and_stays_legal() -> None:
    ids, mask = torch.arange(6).reshape(3, 2), torch.ones(3, 2, dtype=torch.bool)
    bound = bind(Model(), (X, [ids, Z]), {"mask": mask})
    for index, tensor in enumerate(bound.tensors()):
        alone = bound.varied_alone(index)
        changed = [
            not torch.equal(a, b) for a, b in zip(alone.tensors(), bound.tensors(), strict=True)
        ]
        assert changed == [number == index for number in range(4)]
        assert alone.tensors()[index].dtype == tensor.dtype
    assert set(bound.varied_alone(1).tensors()[1].flatten().tolist()) == set(range(6))
