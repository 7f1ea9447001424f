import pytest

from dist_ft.core.errors import ConfigError
from dist_ft.planning import gpus


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("H100", "H100"),
        ("h100", "H100"),
        ("H100-80GB", "H100"),
        ("NVIDIA H200", "H200"),
        ("a100-80gb", "A100-80GB"),
        ("A100 40", "A100-40GB"),
        ("rtx 4090", "RTX4090"),
        ("L40S", "L40S"),
    ],
)
def test_names_in_any_spelling(said, meant):
    assert gpus.named(said) == meant


@pytest.mark.parametrize("name", ["H1000", "A100", "", "TPU"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(
        ConfigError, match=rf"--gpu={name}: no such GPU is known; known are .*A100-80GB.*; give one"
    ):
        gpus.named(name)


@pytest.mark.parametrize(
    ("room", "expected"), [(1000, 1), (999, 2), (101, 10), (100, 10), (99, None)]
)
def test_the_fewest_workers_that_fit(room, expected):
    assert gpus.fewest(lambda world: 1000 // world, 10, room) == expected


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("toy", None),
    ],
)
def test_the_peak_of_a_device_by_the_name_it_gives_itself(device, peak):
    assert gpus.peak_tflops(device) == peak
