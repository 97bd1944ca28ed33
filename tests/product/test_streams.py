"""Streams and CUDA graphs: the same figures as the network run plainly. Needs a GPU."""

import gc
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pnn_compile as pnn
from examples import decoder, resnet110, unet
from pnn_compile.bench.gpu_streams import BASELINE, bench_streams
from pnn_compile.runtime import CapturedForward, CapturedStep, StreamNetwork

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FORMS: list[dict[str, Any]] = [
    {},
    {"coarse": "linear", "sweep": "collapsed"},
    {"iterations": 2},
    {"correction": "difference", "coarse": "conv"},
]


@pytest.fixture(autouse=True)
def _exact() -> Any:
    """Kernels that give the same figures on every run, without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = False


def _compiled(name: str, stages: int = 3, **options: Any) -> tuple[pnn.Compiled, torch.Tensor]:
    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]] = {
        "resnet": (resnet110.build_model(6, 8), resnet110.example_inputs(size=16)),
        "unet": (unet.build_model(depth=3, width=4), unet.example_inputs()),
        "decoder": (decoder.build_model(), decoder.example_inputs()),
    }
    model, inputs = models[name]
    compiled = pnn.compile(model, inputs, stages=stages, **options)
    compiled.module.cuda()
    return compiled, inputs[0].cuda()


@pytest.mark.parametrize("name", ["resnet", "unet", "decoder"])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_outputs_are_those_of_one_stream(name: str, options: dict[str, Any]) -> None:
    if name == "decoder" and options.get("coarse") == "conv":
        options = {**options, "coarse": "lowrank"}
    compiled, x = _compiled(name, **options)
    network = StreamNetwork(compiled).eval()
    run = CapturedForward(network, x)
    with torch.no_grad():
        for _ in range(3):
            passed = x.flip(-1) if x.is_floating_point() else x.flip(0)
            torch.testing.assert_close(run(passed), compiled.module(passed))
            torch.testing.assert_close(network(passed), compiled.module(passed))


@pytest.mark.parametrize("options", FORMS[:3], ids=str)
def test_gradients_and_buffers_are_those_of_one_stream(options: dict[str, Any]) -> None:
    result = []
    for streams in (False, True):
        compiled, x = _compiled("resnet", **options)
        network = StreamNetwork(compiled) if streams else compiled.module
        network.train()
        network(x).square().mean().backward()
        torch.cuda.synchronize()
        gradients = [p.grad for p in compiled.module.parameters()]
        result.append([*gradients, *compiled.module.buffers()])
    torch.testing.assert_close(result[1], result[0], rtol=1e-4, atol=1e-5)


def test_a_captured_step_trains_as_a_plain_loop_does() -> None:
    losses = []
    for captured in (False, True):
        compiled, x = _compiled("resnet")
        y = torch.arange(len(x), device="cuda") % 10
        network = StreamNetwork(compiled).train() if captured else compiled.module.train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-3, capturable=True)
        if captured:
            step = CapturedStep(network, x, y, F.cross_entropy, optimizer)
            losses.append([step(x, y).item() for _ in range(4)])
            continue
        own = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            own.append(loss.item())
        losses.append(own)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)
    assert losses[1][-1] < losses[1][0]


def test_a_captured_network_keeps_its_weights_when_nothing_else_does() -> None:
    compiled, x = _compiled("resnet")
    with torch.no_grad():
        expected = compiled.module.eval()(x)
    run = CapturedForward(StreamNetwork(compiled), x)
    del compiled
    gc.collect()
    torch.cuda.empty_cache()
    others = [torch.full((1024, 1024), 1e9, device="cuda") for _ in range(16)]
    torch.testing.assert_close(run(x), expected)
    assert others


def test_other_shapes_are_refused() -> None:
    compiled, x = _compiled("resnet")
    run = CapturedForward(StreamNetwork(compiled).eval(), x)
    with pytest.raises(pnn.RuntimeFault, match="fixed shapes"):
        run(x[:1])


def test_the_benchmark_holds_what_it_measures_against_the_network() -> None:
    networks = [_compiled("resnet", stages)[0] for stages in (2, 3)]
    for training in (False, True):
        result = bench_streams(
            networks, batches=[1 if not training else 4], training=training, rounds=2
        )
        names = [timing.contender for timing in result.timings]
        assert names[:2] == ["original", BASELINE]
        assert len(names) == 6
        assert all((t.error or 0) < 1e-3 for t in result.timings)
