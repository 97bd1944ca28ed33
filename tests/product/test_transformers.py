"""Models of transformers compile as they come, and their networks are called as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples.coverage.operators import declare
from passes.errors import OptionError

declare()
transformers = pytest.importorskip("transformers")
IDS = (torch.arange(32).view(2, 16) * 7) % 60 + 4


@pytest.fixture(scope="module")
def model() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def compiled(model: Any) -> pnn.Compiled:
    return pnn.compile(model, {"input_ids": IDS, "labels": IDS}, stages=2)


def test_the_cache_is_off_in_the_network_alone(model: Any, compiled: pnn.Compiled) -> None:
    assert model.config.use_cache
    config: Any = compiled.module.config
    assert not config.use_cache
    assert any("config.use_cache = False" in note for note in compiled.plan.notes)


def test_the_output_is_that_of_the_model(model: Any, compiled: pnn.Compiled) -> None:
    expected = model(input_ids=IDS, labels=IDS, use_cache=False)
    outputs = compiled.sequential(input_ids=IDS, labels=IDS)
    assert type(outputs) is type(expected) is type(compiled(IDS, IDS))
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs["logits"], expected.logits)


def test_sequences_of_any_length(model: Any) -> None:
    free = ("batch", "sequence")
    compiled = pnn.compile(model, {"input_ids": IDS}, stages=2, dynamic=free, validate="fast")
    ids = torch.cat([IDS, IDS], 1)[:1, :21]
    expected = model.eval()(ids, use_cache=False)
    torch.testing.assert_close(compiled.sequential.eval()(ids).logits, expected.logits)
    assert compiled(ids).logits.shape == (1, 21, 64)


def test_a_loaded_network_returns_the_fields_and_with_the_model_its_output(
    model: Any, compiled: pnn.Compiled, tmp_path: Any
) -> None:
    expected = compiled.module.eval()(IDS, IDS)
    folder = compiled.save(tmp_path / "saved")
    fields = pnn.load(folder).module.eval()(IDS, IDS)
    assert type(fields) is dict
    torch.testing.assert_close(fields["logits"], expected.logits)
    assert type(pnn.load(folder, model)(IDS, IDS)) is type(expected)


def test_arguments_that_the_example_leaves_out_stay_optional(compiled: pnn.Compiled) -> None:
    compiled(input_ids=IDS, labels=IDS, attention_mask=None, use_cache=False, return_dict=True)
    with pytest.raises(OptionError, match="without argument attention_mask"):
        compiled.module(IDS, IDS, attention_mask=torch.ones_like(IDS))
    with pytest.raises(OptionError, match="without argument use_cache"):
        compiled.module(IDS, IDS, use_cache=True)


def test_a_wrong_shape_is_told_by_its_dimension(compiled: pnn.Compiled) -> None:
    with pytest.raises(OptionError, match=r"input_ids is .*\(dimension 1: 12 instead of 16\)"):
        compiled.module(IDS[:, :12], IDS[:, :12])


def test_generation_is_refused_with_a_sentence(compiled: pnn.Compiled) -> None:
    assert not hasattr(compiled.module, "generate")
    with pytest.raises(AttributeError, match="let that generate"):
        _ = compiled.module.generate


def test_attributes_and_types_survive_a_copy(compiled: pnn.Compiled) -> None:
    copied = copy.deepcopy(compiled.module)
    assert copied.config is compiled.module.config
    assert copied.main_input_name == "input_ids"
    assert type(copied(IDS, IDS)) is type(compiled(IDS, IDS))


def test_shared_weights_are_saved_once_and_loaded_by_any_of_their_names(
    compiled: pnn.Compiled,
) -> None:
    module = copy.deepcopy(compiled.module)
    named = dict(module.named_parameters(remove_duplicate=False))
    tied = [name for name in named if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(tied) == 3  # guess, first stage, head
    assert len({id(named[name]) for name in tied}) == 1
    state = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    assert [name for name in tied if name in state] == tied[:1]
    nn.ModuleDict({"inner": module}).load_state_dict({f"inner.{n}": v for n, v in state.items()})
    assert not named[tied[-1]].any()
    module.load_state_dict({name: torch.ones_like(value) for name, value in named.items()})
    assert named[tied[0]].all()
