import pytest

from dist_ft.planning.gathered_weights import Limits, simulate
from dist_ft.planning.model_shape import LanePeaks, ModelShape, PeakBytes, WeightShape

NO_PEAKS = LanePeaks(PeakBytes(0, 0), PeakBytes(0, 0))


def shape(*numel):
    """Return a model whose modules run in the order of their weights."""
    return ModelShape(
        "x",
        tuple(WeightShape(f"w{i}", size) for i, size in enumerate(numel)),
        tuple((i,) for i in range(len(numel))),
        NO_PEAKS,
        NO_PEAKS,
    )


def test_small_model_is_whole_between_forward_and_backward():
    assert simulate(shape(100, 200, 300), Limits(persistent=10)).most == 600


def test_one_module_at_a_time_without_prefetch_and_reuse():
    found = simulate(
        shape(100, 200, 300), Limits(prefetch=0, persistent=10, max_live=0, max_reuse=0)
    )
    assert (found.most, found.at_once) == (300, 300)


@pytest.mark.parametrize(("max_live", "most"), [(1000, 300), (100, 100)])
def test_prefetched_weights_are_whole(max_live, most):
    """Each module prefetches one more; at the start of the backward pass, two are prefetched."""
    found = simulate(
        shape(100, 100, 100, 100, 100),
        Limits(prefetch=100, persistent=10, max_live=max_live, max_reuse=0),
    )
    assert found.most == most


def test_small_weights_are_never_released():
    found = simulate(
        shape(5, 100, 5, 100), Limits(prefetch=0, persistent=5, max_live=0, max_reuse=0)
    )
    assert (found.persistent, found.most) == (10, 110)


def test_only_weights_used_again_soon_are_not_released():
    """The next use is 0 elements after the last module, 200 after the second, 400 after the first."""
    for max_reuse, most in ((0, 100), (150, 100), (250, 200), (450, 300)):
        assert (
            simulate(
                shape(100, 100, 100),
                Limits(prefetch=0, persistent=1, max_live=1000, max_reuse=max_reuse),
            ).most
            == most
        )


def test_limits_are_read_from_the_config():
    assert Limits.from_config(
        {"stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": 8.0, "stage": 3}
    ) == Limits(prefetch=7, max_live=8)
