"""Distillation by interface before the end-to-end fit: what it trains, and what it leaves alone."""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pnn_compile as pnn
from examples import decoder
from passes.ir.isolation import preserved
from passes.transform.executor import Executor, State
from pnn_compile.cli import main
from pnn_compile.fit.calibrate import calibrate_candidates
from pnn_compile.fit.distill import Distiller
from pnn_compile.fit.optimizer import random_state, set_random_state
from pnn_compile.fit.regression_sweep import CurrentOperators
from tests.models.builders import Shifts, block_list, linear_chain
from tests.models.zoo import by_name
from tests.support.programs import call, copies


def _compile(name: str = "resnet", **options: Any) -> pnn.Compiled:
    case = by_name(name)
    return pnn.compile(
        case.build(), args=case.args(2), kwargs=case.kwargs(2), stages=3, coarse_budget=1.0,
        **options,
    )  # fmt: skip


_compiled = copies(_compile)


def _images(count: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 3, 8, 8, generator=generator).split(8))


def _distiller(compiled: pnn.Compiled, total: int = 40, learning_rate: float = 1e-2) -> Distiller:
    def trainer(
        parameters: Any, steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        built = torch.optim.AdamW(parameters, learning_rate)
        return built, torch.optim.lr_scheduler.LambdaLR(built, lambda step: 1.0)

    teacher = copy.deepcopy(compiled.sequential).eval().requires_grad_(False)
    return Distiller(compiled, teacher, trainer, total, autocast=None, clip_norm=1.0)


def _distil(compiled: pnn.Compiled, batches: list[Any], epochs: int = 5) -> Distiller:
    distiller = _distiller(compiled, epochs * len(batches))
    distiller.train(dropout=True)
    for _ in range(epochs):
        for batch in batches:
            distiller.train_step(batch)
    return distiller


FORMS: tuple[dict[str, Any], ...] = (
    {"coarse": "linear"},
    {"coarse": "conv"},
    {"coarse": "linear+conv", "correction": "difference"},
    {"coarse": "linear", "sweep": "collapsed"},
    {"coarse": "units", "sweep": "collapsed"},
    {"coarse": "linear", "iterations": 3},
)


@pytest.mark.parametrize(
    "options", [*(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[:2]), *FORMS[2:]]
)
def test_every_interface_learns_and_the_fine_stages_stay(options: dict[str, Any]) -> None:
    compiled = _compiled(preprocess="lowrank+conv", **options)
    before = {key: value.clone() for key, value in compiled.original_state_dict().items()}
    assert any("running_mean" in key for key in before)
    report = _distil(compiled, _images()).report()
    assert [face.stage for face in report] == [1, 2]
    for face in report:
        assert face.guess_last < 0.8 * face.guess_first
    for guess in compiled.operators.preprocess.values():
        guess.requires_grad_(False)  # now the corrections' goals stand still
    for face in _distil(compiled, _images()).report():
        assert face.guess_last == pytest.approx(face.guess_first, rel=0.25)  # other batches
        assert face.correction_last < 0.95 * face.correction_first
    for key, value in compiled.original_state_dict().items():
        assert torch.equal(value, before[key]), key
    owned = [*compiled.stages.fine, compiled.stages.head]
    assert all(p.grad is None for piece in owned for p in piece.parameters())


def test_what_a_guess_shares_with_the_first_stage_stays() -> None:
    model = decoder.build_model(layers=3, width=16, context=16)
    tokens = torch.randint(256, (32, 16), generator=torch.Generator().manual_seed(0))
    compiled = pnn.compile(model, tokens[:2], stages=3, coarse="linear", coarse_budget=1.0)
    fine = {id(p) for piece in compiled.stages.fine for p in piece.parameters()}
    shared = [p for p in compiled.operators.preprocess[1].parameters() if id(p) in fine]
    assert shared  # the embedding, which both of them read
    before = [p.detach().clone() for p in shared]
    report = _distil(compiled, list(tokens.split(8))).report()
    assert all(face.guess_last < face.guess_first for face in report)
    for parameter, value in zip(shared, before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None


@pytest.mark.parametrize("sweep", ["chain", "collapsed"])
def test_no_gradient_crosses_an_interface(sweep: Any) -> None:
    together = _compiled(coarse="linear", sweep=sweep)
    _distil(together, _images(16))
    alone = _compiled(coarse="linear", sweep=sweep)
    frozen = (alone.operators.preprocess[1], alone.operators.coarse[1], alone.operators.coarse[2])
    for operator in frozen[: 2 if sweep == "chain" else 3]:
        operator.requires_grad_(False)
    _distil(alone, _images(16))
    names = ["preprocess_2"] + ["coarse_2"] * (sweep == "chain")  # P_2 reads what the guess 1 gave
    for name in names:
        expected = together.operators.named().get_submodule(name).state_dict()
        result = alone.operators.named().get_submodule(name).state_dict()
        start = _compiled(coarse="linear", sweep=sweep).operators.named().get_submodule(name)
        for key, value in result.items():
            assert torch.equal(value, expected[key]), key
        assert any(not torch.equal(v, result[k]) for k, v in start.state_dict().items())


def test_the_fine_stage_itself_leaves_nothing_to_correct() -> None:
    """In difference form G = g gives exactly the error that is left."""
    compiled = _compiled(coarse="exact", correction="difference")
    report = _distil(compiled, _images(), epochs=2).report()
    for face in report:
        assert face.correction_first < 1e-8
        assert face.correction_last < 1e-8
        assert face.guess_last < face.guess_first


@pytest.mark.parametrize("name", ["resnet", "unet", "dense_block", "encoder_decoder"])
def test_the_goals_of_a_collapsed_sweep_add_up_to_the_original(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = _compiled(name, sweep="collapsed", coarse="linear")
    distiller = _distiller(compiled)
    goals: list[State] = []

    def train(self: Distiller, name: str, state: State, target: State) -> float:
        if name.startswith("coarse"):
            goals.append({key: target[key] for key in state})
        return 0.0

    monkeypatch.setattr(Distiller, "_train", train)
    with preserved(compiled.module):
        distiller.train(dropout=True)
        distiller.train_step(call(name, 3))
        executor, inputs = Executor(compiled), call(name, 3)
        true = last = executor.advance(0, {}, executor.fine(0, {}, inputs))
        for number in (1, 2):
            guess = executor.guess(number, inputs)
            last = executor.advance(number, last, executor.fine(number, guess, inputs))
            true = executor.advance(number, true, executor.fine(number, true, inputs))
    assert len(goals) == 2
    for goal in goals:
        for key, value in goal.items():
            last[key] = last[key] + value
    for key, value in true.items():
        torch.testing.assert_close(last[key], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "stop_at"),
    [({}, 3), ({"iterations": 2}, 8), ({"sweep": "collapsed"}, 13)],  # before, at, after the turn
)
def test_an_interrupted_fit_goes_on_bit_for_bit(
    options: dict[str, Any], stop_at: int, tmp_path: Path
) -> None:
    class Interrupted(Exception):
        pass

    def stop(step: int, total: int, loss: float) -> None:
        assert total == 16
        if step == stop_at:
            raise Interrupted

    settings: dict[str, Any] = {"epochs": 2, "interface_epochs": 2, "checkpoint_every": 3}
    whole = _compiled(coarse="linear", **options)
    expected = pnn.fit(whole, _images(32), **settings)
    settings["checkpoint"] = tmp_path / "fit.pt"
    with pytest.raises(Interrupted):
        pnn.fit(_compiled(coarse="linear", **options), _images(32), progress=stop, **settings)
    again = _compiled(coarse="linear", **options)
    assert pnn.fit(again, _images(32), **settings) == expected
    assert (expected.steps, expected.interface_steps, expected.samples) == (8, 8, 64)
    pieces = [nn.ModuleList([c.module, c.operators.named()]) for c in (whole, again)]
    result = pieces[1].state_dict()
    for key, value in pieces[0].state_dict().items():
        assert torch.equal(value, result[key]), key


def test_a_fit_of_interfaces_leaves_modes_and_gradients() -> None:
    compiled = _compiled(coarse="linear", iterations=2)  # its module lacks the last guess
    whole = nn.ModuleList([compiled.module, compiled.operators.named()])
    compiled.module.eval()
    modes = [module.training for module in whole.modules()]
    pnn.fit(compiled, _images(16), interface_epochs=1)
    assert [module.training for module in whole.modules()] == modes
    assert all(parameter.grad is None for parameter in whole.parameters())


class Dropping(nn.Module):
    """Dropout by module, by function and in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, 4, 8]` to the same."""
        p = 0.5 if self.training else 0.0
        for layer in self.layers:
            y = self.dropout(layer(x)).unsqueeze(1)
            y = nn.functional.scaled_dot_product_attention(y, y, y, dropout_p=p).squeeze(1)
            x = x + nn.functional.dropout(y, 0.5, self.training)
        return x


@pytest.mark.parametrize("interface_epochs", [0, 1])
def test_dropout_is_off_in_a_fit_unless_asked_for(interface_epochs: int) -> None:
    rows = list(torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0)).split(4))

    def weights(seed: int, **options: Any) -> torch.Tensor:
        torch.manual_seed(0)
        compiled = pnn.compile(Dropping(), rows[0], stages=3)
        torch.manual_seed(seed)
        pnn.fit(compiled, rows, interface_epochs=interface_epochs, **options)
        assert compiled.module.training
        return nn.utils.parameters_to_vector(compiled.module.parameters()).detach()

    assert torch.equal(weights(1), weights(2))
    assert not torch.equal(weights(1, dropout=True), weights(2, dropout=True))


def test_recurrent_layers_and_attention_drop_nothing_in_a_fit() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.memory = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.memory(self.first(x))[0]
            result: torch.Tensor = self.last(x + self.attention(x, x, x)[0])
            return result

    rows = list(torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0)).split(4))

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(0)
        compiled = pnn.compile(Mixed(), rows[0], stages=2)
        torch.manual_seed(seed)
        pnn.fit(compiled, rows)
        [memory] = [m for m in compiled.module.modules() if isinstance(m, nn.LSTM)]
        assert memory.dropout == 0.5
        return nn.utils.parameters_to_vector(compiled.module.parameters()).detach()

    assert torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("count", [5, 7, 8])
def test_half_an_epoch_for_each_part_sees_every_sample_once(count: int) -> None:
    visited: list[float] = []

    class Loader:
        def __len__(self) -> int:
            return count

        def __iter__(self) -> Iterator[torch.Tensor]:
            for batch in _images(8 * count):
                visited.append(batch[0, 0, 0, 0].item())
                yield batch

    report = pnn.fit(_compiled(coarse="linear"), Loader(), interface_epochs=0.5, epochs=0.5)
    assert report.steps + report.interface_steps == len(visited) == len(set(visited)) == count


def test_a_loader_that_gives_its_batches_once_is_refused() -> None:
    class Once:
        def __init__(self) -> None:
            self._batches = iter(_images())

        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Iterator[torch.Tensor]:
            return self._batches

    with pytest.raises(pnn.OptionError, match="no batches after 8 of 16 steps"):
        pnn.fit(_compiled(coarse="linear"), Once(), epochs=2)


def test_the_closed_form_between_the_parts_replaces_nothing_that_was_better() -> None:
    compiled = _compile(coarse="linear", calibration=_images(160))
    executor = Executor(compiled)
    kept = calibrate_candidates(
        compiled, _images(40), executor, CurrentOperators(executor), keep_better=True
    )
    solved = pnn.calibrate(compiled, _images(40))
    for one, other in zip(kept.interfaces, solved.interfaces, strict=True):
        assert one.guess_after <= min(one.guess_before, other.guess_after) + 1e-6
    assert any(
        one.guess_after < other.guess_after
        for one, other in zip(kept.interfaces, solved.interfaces, strict=True)
    )


def test_batches_are_left_as_they_are() -> None:
    model = nn.Sequential(Shifts(), *block_list(4, 8))
    compiled = pnn.compile(model, torch.randn(2, 8), stages=2)
    x = torch.randn(16, 8)
    before = x.clone()
    pnn.fit(compiled, [x], interface_epochs=1)
    assert torch.equal(x, before)


def test_lower_precision_and_another_optimizer() -> None:
    built: list[list[nn.Parameter]] = []

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        built.append(list(parameters))
        return torch.optim.SGD(built[-1], 1e-3)

    compiled = _compiled(coarse="linear")
    report = pnn.fit(
        compiled, _images(16), interface_epochs=1, optimizer=sgd, autocast=torch.bfloat16
    )
    assert len(built) == 5  # two guesses, two corrections, the whole
    assert len(report.interfaces) == 2


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    compiled = _compiled(coarse="linear")
    with pytest.raises(pnn.OptionError, match="interface_epochs must be finite and at least 0"):
        pnn.fit(compiled, _images(16), interface_epochs=-1)
    compiled.operators.named().requires_grad_(False)
    with pytest.raises(pnn.OptionError, match="leave interface_epochs out"):
        pnn.fit(compiled, _images(16), interface_epochs=1)
    single = pnn.compile(by_name("mlp").build(), by_name("mlp").args(2), stages=1)
    with pytest.raises(pnn.OptionError, match="leave interface_epochs out"):
        pnn.fit(single, [by_name("mlp").args(2)], interface_epochs=1)
    broken = [torch.full((8, 3, 8, 8), float("nan"))]
    with pytest.raises(pnn.OptionError, match="the loss of preprocess_1 is nan"):
        pnn.fit(_compiled(coarse="linear"), broken, interface_epochs=1)

    file = tmp_path / "fit.pt"
    pnn.fit(_compiled(coarse="linear"), _images(16), interface_epochs=1, checkpoint=file)
    for epochs, reason in ((2, "takes 2 steps per interface, not 4"), (0, "interfaces in one of")):
        with pytest.raises(pnn.OptionError, match=f"{reason}.*delete it to start anew"):
            pnn.fit(
                _compiled(coarse="linear"), _images(16), interface_epochs=epochs, checkpoint=file
            )


def test_random_states_of_cuda_devices_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnTwo(nn.Module):
        """Says that its tensors lie on two CUDA devices."""

        def parameters(self, recurse: bool = True) -> Any:
            class Held:
                def __init__(self, device: str) -> None:
                    self.device = torch.device(device)

            return iter([Held("cuda:1"), Held("cuda:0"), Held("cuda:1"), Held("cpu")])

    states = {0: torch.tensor([1], dtype=torch.uint8), 1: torch.tensor([2], dtype=torch.uint8)}
    put: dict[int, torch.Tensor] = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: put.__setitem__(device, state)
    )
    result = random_state(OnTwo())
    assert result["cuda"] == states
    expected = torch.rand(3)
    set_random_state(OnTwo(), {**result, "cuda": {1: states[1]}})
    assert torch.equal(torch.rand(3), expected)
    assert put == {1: states[1]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_interrupted_fit_with_dropout_goes_on_alike_on_cuda(tmp_path: Path) -> None:
    def build() -> pnn.Compiled:
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(6)]
        compiled = pnn.compile(nn.Sequential(*layers), torch.randn(2, 8), stages=3)
        compiled.module.cuda()
        return compiled

    rows = list(torch.randn(64, 8).split(8))
    torch.manual_seed(1)
    whole = build()
    pnn.fit(whole, rows, epochs=2, dropout=True)
    file, halved = tmp_path / "fit.pt", build()

    def stop(step: int, total: int, loss: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pnn.fit(
            halved, rows, epochs=2, dropout=True, checkpoint=file, checkpoint_every=5, progress=stop
        )
    again = build()
    pnn.fit(again, rows, epochs=2, dropout=True, checkpoint=file)
    for a, b in zip(whole.module.parameters(), again.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_command_line_shows_every_interface(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data.safetensors"
    _compiled(coarse="linear").save(out)
    save_file({"input": torch.cat(_images())}, data)
    words = ["fit", str(out), str(data), "--batch", "8", "--interface-epochs", "2"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "losses by interface, 16 steps" in text
    assert "8 steps on 64 samples" in text
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [face["stage"] for face in document["interfaces"]] == [1, 2]


class Writer:
    """What a fit needs of TensorBoard's `SummaryWriter`."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))


def test_a_fit_logs_to_a_callable_and_to_tensorboard() -> None:
    compiled = pnn.compile(linear_chain(4, 8), torch.randn(2, 8), stages=2)
    batches = [torch.randn(4, 8) for _ in range(6)]
    rows: list[tuple[int, Mapping[str, float]]] = []
    compiled.fit(
        batches, interface_epochs=0.5, log=lambda step, values: rows.append((step, values))
    )
    assert [step for step, _ in rows] == list(range(1, 10))
    assert [len(values) for _, values in rows] == [1] * 3 + [2] * 6
    assert set(rows[-1][1]) == {"fit/loss", "fit/learning_rate"}
    writer = Writer()
    compiled.fit(batches, log=writer)
    assert [step for name, _, step in writer.rows if name == "fit/loss"] == list(range(1, 7))


def test_a_fit_that_leads_away_from_the_original_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled = pnn.compile(linear_chain(4, 8), torch.randn(2, 8), stages=2)
    batches = [torch.randn(4, 8) for _ in range(6)]
    report = compiled.fit(batches, learning_rate=3.0)
    assert report.last_loss > report.first_loss
    assert "the loss rose from" in caplog.text
    assert "lower learning rate" in caplog.text


def test_the_command_leaves_an_artifact_alone_that_a_fit_would_make_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "data.safetensors"
    pnn.compile(linear_chain(4, 8), torch.randn(2, 8), stages=2).save(out)
    save_file({"x": torch.randn(24, 8)}, data)
    before = (out / "program.safetensors").read_bytes()
    words = ["fit", str(out), str(data), "--batch", "4"]
    assert main([*words, "--learning-rate", "3"]) == 2
    error = capsys.readouterr().err
    assert "left as it was" in error
    assert "try --learning-rate 0.3" in error
    assert (out / "program.safetensors").read_bytes() == before
    assert main([*words, "--learning-rate", "0.001"]) == 0
    assert (out / "program.safetensors").read_bytes() != before
