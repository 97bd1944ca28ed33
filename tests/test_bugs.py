"""One test per bug that was found once."""

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from passes.cost.flops import count_work
from tests.models.builders import Exported, LanguageModel, Residual, block_chain, residual_chain
from tests.models.zoo import by_name


def _blocks(count: int = 6, width: int = 16) -> nn.ModuleList:
    return nn.ModuleList(Residual(width) for _ in range(count))


class WritesItsInput(nn.Module):
    """Derives a cheap value from its input, then overwrites the input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = _blocks()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean(1, keepdim=True) * 3
        x.mul_(0.5)
        h = x * 1
        for block in self.blocks:
            h = block(h) * (1 + scale)
        return h


def test_a_side_value_is_never_recomputed_from_memory_that_was_overwritten() -> None:
    compiled = pnn.compile(WritesItsInput(), torch.randn(4, 16), stages=3)
    assert compiled.verify().ok


def test_inputs_are_not_written_into_and_the_backward_pass_works() -> None:
    x = torch.randn(4, 16)
    before = x.clone()
    compiled = pnn.compile(WritesItsInput(), x, stages=3)
    compiled.module.train()(x).square().mean().backward()
    assert torch.equal(x, before)


@pytest.mark.parametrize("first", [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)])
def test_a_model_may_start_with_an_in_place_activation(first: nn.Module) -> None:
    compiled = pnn.compile(nn.Sequential(first, *_blocks()), torch.randn(4, 16), stages=3)
    assert compiled.verify().ok
    compiled.module.train()(torch.randn(4, 16)).sum().backward()


def test_fused_layers_are_counted_by_what_they_compute() -> None:
    lstm, x = nn.LSTM(32, 32, batch_first=True).eval(), torch.randn(2, 10, 32)
    assert count_work(lambda: lstm(x))[0] >= 2 * 2 * 10 * 4 * (32 * 32 + 32 * 32)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True).eval()
    assert count_work(lambda: layer(x))[0] >= 2 * 2 * 10 * (4 * 32 * 32 + 2 * 32 * 64)
    attention = nn.MultiheadAttention(32, 2, batch_first=True).eval()
    assert count_work(lambda: attention(x, x, x))[0] >= 2 * 2 * 10 * 4 * 32 * 32


def test_layers_that_torch_fuses_are_not_taken_for_side_values() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.LSTM(8, 8, batch_first=True) for _ in range(4))
            self.last = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x, _ = layer(x)
            return self.last(x)

    compiled = pnn.compile(Recurrent(), torch.randn(2, 6, 8), stages=2)
    assert compiled.plan.forecast.imbalance < 1.1
    assert not any(stage.sides for stage in compiled.plan.stages)


def test_a_model_in_evaluation_mode_stays_in_it_as_a_whole() -> None:
    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()] * 4
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *layers)
    compiled = pnn.compile(model.eval(), torch.randn(2, 3, 8, 8), stages=3)
    assert not any(module.training for module in compiled.module.modules())


def test_an_example_of_one_sample_does_not_switch_the_gradient_check_off() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.first(x))
            with torch.no_grad():
                z = 2 * y
            return y + z

    report = pnn.compile(Net(), torch.randn(1, 8), stages=1).program.capture
    assert "gradient" in report.rejected[0]


def test_an_example_of_one_sample_still_shows_what_is_random() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dropout, self.blocks = nn.BatchNorm1d(16), nn.Dropout(), _blocks()

        def forward(self, x: Tensor) -> Tensor:
            gate = self.dropout(x * 2)
            h = self.norm(x)
            for block in self.blocks:
                h = block(h) + gate
            return h

    compiled = pnn.compile(Net(), torch.randn(1, 16), stages=3)
    assert not any("dropout" in name for stage in compiled.plan.stages for name in stage.sides)


def test_a_network_that_cannot_run_fails_verification() -> None:
    compiled = pnn.compile(nn.Sequential(*_blocks()), torch.randn(4, 16), stages=3)
    with torch.no_grad():
        next(compiled.operators.coarse[1].parameters()).fill_(float("nan"))
    failed = [check for check in compiled.verify().checks if not check.passed]
    assert any("not finite" in check.reason for check in failed)


def test_a_network_of_mixed_precision_compiles() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = _blocks(4), _blocks(4).double()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.low:
                x = block(x)
            x = x.double()
            for block in self.high:
                x = block(x)
            return x

    for coarse in ("linear", "lowrank", "conv"):
        compiled = pnn.compile(Net(), torch.randn(4, 16), stages=4, coarse=coarse)
        assert compiled.verify().ok
        compiled.module.train()(torch.randn(4, 16)).sum().backward()


def test_a_rank_that_depends_on_the_batch_size_is_explained() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).squeeze())

    with pytest.raises(pnn.CaptureError, match="at least two samples"):
        pnn.compile(Net(), torch.randn(1, 16), stages=2)


def test_units_of_a_frozen_model_train() -> None:
    model = nn.Sequential(*_blocks()).requires_grad_(False)
    compiled = pnn.compile(model, torch.randn(4, 16), stages=3, coarse="units", coarse_budget=1.0)
    assert all(p.requires_grad for p in compiled.operators.coarse[1].parameters())


def test_dropout_in_a_coarse_network_does_not_correct_a_residual_of_zero() -> None:
    class Dropped(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return x + nn.functional.dropout(torch.tanh(self.linear(x)), 0.5, self.training)

    model = nn.Sequential(*(Dropped(16) for _ in range(6)))
    compiled = pnn.compile(
        model, torch.randn(4, 16), stages=3, coarse="units", correction="difference",
        coarse_budget=1.0,
    )  # fmt: skip
    x = torch.randn(4, 16)
    correction = compiled.operators.coarse[1].train()(x, torch.zeros_like(x))
    assert torch.equal(correction, torch.zeros_like(x))


def test_low_rank_maps_of_different_widths_are_fitted_together() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split = nn.Linear(16, 72)
            self.wide, self.slim = _blocks(4, 64), _blocks(4, 8)
            self.join = nn.Linear(72, 16)

        def forward(self, x: Tensor) -> Tensor:
            wide, slim = self.split(x).split([64, 8], 1)
            for a, b in zip(self.wide, self.slim, strict=True):
                wide, slim = a(wide) + slim.mean(1, keepdim=True), b(slim)
            return self.join(torch.cat([wide, slim], 1))

    x = torch.randn(256, 16)
    compiled = pnn.compile(Towers().eval(), x[:2], stages=2, coarse="lowrank", coarse_budget=1.0)
    report = pnn.calibrate(compiled, list(x.split(32)))
    assert report.output_error_after < report.output_error_before


def test_tensors_in_a_container_that_torch_does_not_know_are_refused() -> None:
    from collections import UserDict

    class Net(nn.Module):
        def forward(self, batch: UserDict[str, Tensor]) -> Tensor:
            return batch["x"] * 2

    with pytest.raises(pnn.CaptureError, match="UserDict"):
        pnn.compile(Net(), (UserDict(x=torch.randn(2, 4)),), stages=1)


def test_options_that_are_misread_are_refused() -> None:
    model, x = nn.Sequential(*_blocks()), torch.randn(4, 16)
    with pytest.raises(pnn.OptionError, match="list of names"):
        pnn.compile(model, x, cuts="1")
    plan = pnn.compile(model, x, stages=2).plan
    with pytest.raises(pnn.OptionError, match="a plan decides everything"):
        pnn.compile(model, x, plan=plan, correction="difference")
    with pytest.raises(pnn.PartitionError, match="lies in the head"):
        pnn.compile(nn.Sequential(*_blocks(), nn.Flatten()), x, cuts=["6"])


def test_statistics_that_are_updated_more_than_once_are_noted() -> None:
    model = block_chain(6, 8, norm=True)
    plan = pnn.compile(model, torch.randn(4, 8), stages=3, iterations=2).plan
    assert any("BatchNorm" in note for note in plan.notes)


def test_a_model_that_changes_buffers_in_every_mode_is_not_computed_again_by_the_oracles() -> None:
    """Fine stages that run twice would see other buffers the second time."""
    case = by_name("running_mean")
    report = pnn.compile(case.build(), case.args(4), stages=3).verify(strict=True)
    skipped = [check.name for check in report.checks if "not run" in check.name]
    assert len(skipped) == 2


class ScalesItsEmbedding(nn.Module):
    """Multiplies the embedding in place, and fills a mask in place, before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = _blocks()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        h *= 4
        mask = torch.zeros_like(ids, dtype=torch.float32)
        early = mask + 1
        mask.masked_fill_(ids == 0, -1.0)
        h = h + early.unsqueeze(-1)
        for block in self.blocks:
            h = block(h) + mask.unsqueeze(-1)
        return h


def test_values_written_in_place_are_recomputed_with_every_write() -> None:
    """The guesses had no source, and the mask counted as a state."""
    compiled = pnn.compile(ScalesItsEmbedding(), torch.randint(50, (4, 7)), stages=3)
    assert all(len(interface.state) == 1 for interface in compiled.plan.interfaces)
    assert compiled.verify(strict=True).ok


class Flattens(nn.Module):
    """Every block takes a view of all tokens at once, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.blocks = _blocks()

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h.view(-1, 16)).view(h.shape)
        return h


def test_a_guess_has_the_layout_that_a_stage_takes_views_of() -> None:
    """Guesses came with channels in front, transposed; the view of the first block failed."""
    compiled = pnn.compile(Flattens(), torch.randint(50, (4, 7)), stages=3)
    assert compiled.verify(strict=True).ok


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    model = LanguageModel(Exported(residual_chain(6, 16)), 16).eval()
    ids = torch.randint(0, 20, (4, 6))
    compiled = pnn.compile(model, (ids, ids), stages=2)
    assert compiled.program.capture.rung == "torch.export"
    inputs = torch.randint(0, 20, (2, 4, 6)).unbind()
    for found, wanted in zip(compiled.sequential(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)


class Whitens(nn.Module):
    """Decomposes the covariance of the tokens, which fails where all are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x) @ torch.linalg.cholesky(x.mT @ x) * 0.01)


def test_layers_that_refuse_zeros_are_not_copied() -> None:
    """A copied block was run on a state of zeros, whose error reached the user."""
    model, x = nn.Sequential(*(Whitens() for _ in range(6))), torch.randn(3, 16, 8)
    compiled = pnn.compile(model, x, stages=3, coarse_budget=1.0)
    assert {stage.coarse.family for stage in compiled.plan.stages[1:] if stage.coarse} == {"linear"}
    with pytest.raises(pnn.SynthesisError, match=r"coarse='units' fails .*_LinAlgError: .*; use"):
        pnn.compile(model, x, stages=3, coarse="units")
