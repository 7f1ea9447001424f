import pytest

from dist_ft.core.errors import ConfigError
from dist_ft.planning import gpus


@pytest.mark.parametrize(
    ("given", "expected"),
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
def test_gpu_names_in_any_spelling(given, expected):
    assert gpus.canonical_name(given) == expected


@pytest.mark.parametrize("name", ["H1000", "A100", "", "TPU"])
def test_unknown_gpu_is_refused(name):
    with pytest.raises(
        ConfigError, match=rf"--gpu={name}: unknown GPU. Known GPUs: .*A100-80GB.* Use one of these"
    ):
        gpus.canonical_name(name)


@pytest.mark.parametrize(
    ("available_bytes", "expected"), [(1000, 1), (999, 2), (101, 10), (100, 10), (99, None)]
)
def test_fewest_workers_that_fit(available_bytes, expected):
    assert gpus.fewest_workers(lambda world: 1000 // world, 10, available_bytes) == expected


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA GH200 480GB", 989),
        ("Tesla V100S-PCIE-32GB", 130),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("toy", None),
    ],
)
def test_peak_of_a_device_by_its_name(device, peak):
    assert gpus.peak_tflops(device) == peak
