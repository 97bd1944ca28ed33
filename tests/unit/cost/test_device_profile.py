"""Device profiles: what they hold, how they are written, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passes.cost.device_profile import DeviceProfile, read_profile, write_profile
from passes.errors import OptionError
from pnn_compile.forecast.forecast import built_in_profiles, load_profile

POSITIVE = st.floats(min_value=1e-12, max_value=1e18)


def profile(**changes: object) -> DeviceProfile:
    figures: dict[str, object] = {
        "name": "test",
        "flops": {"float32": 1e9, "bfloat16": 4e9},
        "bandwidth": 1e8,
        "launch": 1e-3,
        "memory": 1e9,
        "link_bandwidth": 1e7,
        "link_latency": 1e-4,
    }
    return DeviceProfile(**(figures | changes))  # type: ignore[arg-type]


@given(
    st.text(min_size=1)
    .filter(str.strip)
    .filter(lambda s: s.encode("utf-8", "ignore").decode() == s),
    st.dictionaries(st.sampled_from(["float16", "bfloat16", "int8"]), POSITIVE),
    st.tuples(POSITIVE, POSITIVE, POSITIVE, POSITIVE, POSITIVE, POSITIVE),
    st.booleans(),
)
def test_text_reads_back_the_same(
    name: str, rates: dict[str, float], figures: tuple[float, ...], asynchronous: bool
) -> None:
    keys = ("bandwidth", "launch", "memory", "link_bandwidth", "link_latency")
    written = profile(
        name=name,
        flops=rates | {"float32": figures[-1]},
        asynchronous=asynchronous,
        **dict(zip(keys, figures, strict=False)),
    )
    assert read_profile(write_profile(written), "text") == written


def test_every_built_in_profile_is_whole_and_carries_its_own_name() -> None:
    names = built_in_profiles()
    assert {"cpu-1", "cpu-8", "a100", "h100", "h200", "rtx4090"} <= set(names)
    for name in names:
        assert load_profile(name).name == name
    assert load_profile("H100") == load_profile("h100")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(write_profile(profile()))
    assert load_profile(path) == load_profile(str(path)) == profile()


def test_roofline_takes_the_longer_of_compute_and_memory() -> None:
    device = profile()
    assert device.seconds(1e9, 0) == pytest.approx(1 + 1e-3)
    assert device.seconds(1e9, 0, "torch.bfloat16") == pytest.approx(0.25 + 1e-3)
    assert device.seconds(1e9, 0, "float64") == device.seconds(1e9, 0)
    assert device.seconds(10, 1e8) == pytest.approx(1 + 1e-3)
    assert device.seconds(0, 0) == 1e-3
    assert device.transfer(1e7) == pytest.approx(1 + 1e-4)


def test_launches_hide_behind_work_where_they_are_asynchronous() -> None:
    device = profile(asynchronous=True)
    assert device.seconds(1e9, 0) == 1
    assert device.seconds(1, 1) == 1e-3


def test_messages_between_nodes_take_the_network() -> None:
    device = profile(node=4, network_bandwidth=1e6, network_latency=1e-2)
    assert [device.transfer(1e6, rank=r) for r in (1, 3, 5)] == pytest.approx([0.1 + 1e-4] * 3)
    assert [device.transfer(1e6, rank=r) for r in (4, 8)] == pytest.approx([1 + 1e-2] * 2)
    assert read_profile(write_profile(device), "text") == device
    cut = "\n".join(line for line in write_profile(device).splitlines() if "network" not in line)
    with pytest.raises(OptionError, match="missing: network_bandwidth, network_latency"):
        read_profile(cut, "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops": {"bfloat16": 1.0}}, "needs FLOP/s of float32"),
        ({"flops": {"float32": 0}}, r"flops.float32 must be a positive number \(0\)"),
        ({"memory": -1.0}, "memory must be a positive number"),
        ({"launch": -1e-6}, "launch must be a number, 0 or more"),
        ({"link_latency": float("inf")}, "link_latency must be finite"),
        ({"bandwidth": float("nan")}, "bandwidth must be"),
        ({"bandwidth": "fast"}, "bandwidth must be"),
        ({"memory": True}, "memory must be"),
        ({"name": " "}, "needs a name"),
        ({"asynchronous": 1}, "asynchronous is true or false"),
        ({"node": -8}, "node must be a number of devices"),
        ({"node": True}, "node must be a number of devices"),
        ({"network_bandwidth": 0.0}, "network_bandwidth must be a positive number"),
    ],
)
def test_figures_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        profile(**changes)


def test_texts_that_are_no_profile_are_refused() -> None:
    with pytest.raises(OptionError, match="x is not TOML"):
        read_profile("name = ", "x")
    with pytest.raises(OptionError, match=r"missing: bandwidth, flops.*unknown: speed"):
        read_profile('name = "a"\nspeed = 3\nlaunch = 0\nmemory = 1\n', "x")
    text = write_profile(profile()).replace("100000000.0", "-1")
    with pytest.raises(OptionError, match="x: bandwidth must be"):
        read_profile(text, "x")


def test_profiles_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no built-in device profile is called 'h1000'.*h100"):
        load_profile("h1000")
    with pytest.raises(OptionError, match=r"none\.toml cannot be read: No such file"):
        load_profile(tmp_path / "none.toml")


def test_profiles_are_frozen_values() -> None:
    assert hash(profile()) == hash(profile())
    with pytest.raises(dataclasses.FrozenInstanceError):
        profile().name = "other"  # type: ignore[misc]
