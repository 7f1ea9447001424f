import pytest

from dist_ft.planning.gathered_weights import Limits, play
from dist_ft.planning.model_shape import Held, Lane, ModelShape, Weight

NOTHING = Lane(Held(0, 0), Held(0, 0))


def shape(*numel):
    """Return a model whose modules run in the order of their weights."""
    return ModelShape(
        "x",
        tuple(Weight(f"w{i}", size) for i, size in enumerate(numel)),
        tuple((i,) for i in range(len(numel))),
        NOTHING,
        NOTHING,
    )


def test_a_small_model_is_whole_between_its_forward_and_its_backward():
    assert play(shape(100, 200, 300), Limits(persistent=10)).most == 600


def test_one_module_at_a_time_where_nothing_may_stay():
    found = play(shape(100, 200, 300), Limits(prefetch=0, persistent=10, max_live=0, max_reuse=0))
    assert (found.most, found.at_once) == (300, 300)


@pytest.mark.parametrize(("max_live", "most"), [(1000, 300), (100, 100)])
def test_what_is_fetched_ahead_is_whole_too(max_live, most):
    """Each module lets one more come; where backward begins again with the last, one runs and two are there ahead."""
    found = play(
        shape(100, 100, 100, 100, 100),
        Limits(prefetch=100, persistent=10, max_live=max_live, max_reuse=0),
    )
    assert found.most == most


def test_small_weights_stay():
    found = play(shape(5, 100, 5, 100), Limits(prefetch=0, persistent=5, max_live=0, max_reuse=0))
    assert (found.persistent, found.most) == (10, 110)


def test_weights_used_again_soon_stay_and_others_go():
    """To its use in backward it is 0 elements from the last module, 200 from the one before, 400 from the first."""
    for max_reuse, most in ((0, 100), (150, 100), (250, 200), (450, 300)):
        assert (
            play(
                shape(100, 100, 100),
                Limits(prefetch=0, persistent=1, max_live=1000, max_reuse=max_reuse),
            ).most
            == most
        )


def test_limits_follow_the_config():
    assert Limits.of(
        {"stage3_prefetch_bucket_size": 7, "stage3_max_live_parameters": 8.0, "stage": 3}
    ) == Limits(prefetch=7, max_live=8)
