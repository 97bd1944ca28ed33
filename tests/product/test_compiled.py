"""A compiled network as an object: called, moved, copied and trained as a module is."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from passes.errors import OptionError
from tests.models.builders import block_chain


@pytest.fixture(scope="module")
def network() -> pnn.Compiled:
    torch.manual_seed(0)
    return pnn.compile(block_chain(6, 8), torch.randn(4, 8), stages=3)


def test_it_is_called_as_its_network(network: pnn.Compiled) -> None:
    x = torch.randn(4, 8)
    torch.testing.assert_close(network.eval()(x), network.module(x))


def test_modes_parameters_and_weights_are_those_of_the_network(network: pnn.Compiled) -> None:
    assert network.train() is network
    assert network.module.training
    assert not network.eval().module.training
    assert [*network.parameters()] == [*network.module.parameters()]
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    state = other.state_dict()
    network.load_state_dict(state)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


def test_a_copy_is_independent_and_verifies(network: pnn.Compiled) -> None:
    x = torch.randn(4, 8)
    before = network.module(x).detach().clone()
    other = copy.deepcopy(network)
    assert other.verify().ok
    nn.init.zeros_(next(other.parameters()))
    assert torch.equal(network.module(x), before)


def test_it_moves_to_another_precision(network: pnn.Compiled) -> None:
    other = copy.deepcopy(network).to(torch.float64)
    assert other(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64


def test_pickling_says_what_to_do_instead(network: pnn.Compiled) -> None:
    with pytest.raises(TypeError, match=r"compiled\.save\(directory\)"):
        pickle.dumps(network)


def test_the_example_of_a_lightning_module_is_taken() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model.example_input_array = torch.randn(3, 8)
    assert [*pnn.compile(model, stages=2).program.args["input"].shape] == [3, 8]


@pytest.mark.parametrize("coarse", ["linear", "lowrank", "conv", "units", "thinned"])
def test_the_default_device_decides_nothing(coarse: str, tmp_path: Path) -> None:
    model, x = block_chain(6, 8), torch.randn(6, 8)
    batches = [torch.randn(6, 8) for _ in range(5)]
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            compiled = pnn.compile(model, x, stages=3, coarse=coarse, iterations=1)
            compiled.calibrate(batches)
            compiled.save(tmp_path / device)
            loaded = pnn.load(tmp_path / device)
            assert loaded.verify().ok
            loaded.iterate(x)
        results.append((loaded(x), loaded.state_dict()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("verb", ["probe", "assess", "fit"])
def test_the_default_device_decides_no_training(verb: str, network: pnn.Compiled) -> None:
    batches = [torch.randn(4, 8) for _ in range(5)]
    pairs = [(x, torch.randn(4, 8)) for x in batches]
    with torch.device("meta"):
        if verb == "probe":
            assert network.probe(pairs, steps=8).sentence
        elif verb == "assess":
            assert network.assess(batches, iterations=1).sentence
        else:
            assert copy.deepcopy(network).fit(batches).steps


def test_a_copy_is_assessed(network: pnn.Compiled) -> None:
    batches = [torch.randn(4, 8) for _ in range(5)]
    assert copy.deepcopy(network).assess(batches, iterations=1).sentence


def test_probe_refuses_samples_that_are_not_finite(network: pnn.Compiled) -> None:
    pairs = [(torch.full((4, 8), float("nan")), torch.randn(4, 8)) for _ in range(5)]
    with pytest.raises(OptionError, match="the loss of the original is nan"):
        network.probe(pairs, steps=8)


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float, sizes: list[int]) -> Tensor:
        return self.body(x) * scale + sum(sizes)


def test_a_network_takes_the_positional_arguments_of_its_example() -> None:
    args = (torch.randn(3, 4), 2.0, [1, 2])
    model = Constants()
    compiled = pnn.compile(model, args, stages=1)
    torch.testing.assert_close(compiled(*args), model(*args))
    torch.testing.assert_close(compiled(args[0]), model(*args))
    with pytest.raises(OptionError, match=r"sizes is \[1, 3\], but Constants was compiled with"):
        compiled(args[0], 2.0, [1, 3])
