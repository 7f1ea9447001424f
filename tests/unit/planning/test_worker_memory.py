"""Terms of the ZeRO paper, and what DeepSpeed holds besides."""

import dataclasses

import pytest

from dist_ft.planning import traffic
from dist_ft.planning.model_shape import Held, Lane, ModelShape, Weight
from dist_ft.planning.worker_memory import Setup, of_worker

PSI = 7_500_000_000
NOTHING = Lane(Held(0, 0), Held(0, 0))
MUCH = Lane(Held(10**6, 5), Held(10**6, 5))


def shape(*weights, added=NOTHING, passed=NOTHING):
    made = tuple(
        Weight(f"w{i}", *(w if isinstance(w, tuple) else (w,))) for i, w in enumerate(weights)
    )
    return ModelShape("x", made, tuple((i,) for i in range(len(made))), added, passed)


def setup(**given):
    base = Setup(
        world=64,
        stage=3,
        dtype="bfloat16",
        optimizer="adamw",
        guards=0,
        lanes=1,
        plain=False,
        overlap=False,
        zero={
            "reduce_bucket_size": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        },
    )
    return dataclasses.replace(base, **given)


@pytest.mark.parametrize("world", [1, 4, 64, 1024])
@pytest.mark.parametrize("stage", range(4))
def test_model_state_is_the_papers(stage, world):
    """2 psi + 2 psi + K psi with K = 12 (arXiv:1910.02054, figure 1), over the workers from the stage on."""
    psi, k = 1024 * 7_000_000, 12
    expected = {
        0: (2 + 2 + k) * psi,
        1: (2 + 2) * psi + k * psi // world,
        2: 2 * psi + (2 + k) * psi // world,
        3: (2 + 2 + k) * psi // world,
    }[stage]
    gpu = of_worker(shape(psi), setup(stage=stage, world=world)).gpu
    assert gpu["weights"] + gpu["gradients"] + gpu["optimizer"] == expected


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volume_is_the_papers(stage, times):
    """Section 7: 2 psi up to ZeRO-2, 3 psi with ZeRO-3."""
    moved = traffic.of_step(shape(PSI), setup(stage=stage))
    assert sum(moved.elements.values()) == times * PSI
    assert moved.sent_bytes == times * PSI * 2 * 63 // 64


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_deepspeed_reduces_by_all_reduce(stage, times):
    moved = traffic.of_step(shape(PSI), setup(stage=stage))
    assert moved.sent_by_deepspeed_bytes == times * PSI * 2 * 63 // 64


@pytest.mark.parametrize(("stage", "times"), [(1, 2), (2, 5), (3, 12)])
def test_lanes_reduce_each_from_stage_2_on(stage, times):
    assert (
        sum(traffic.of_step(shape(100), setup(stage=stage, lanes=4)).elements.values())
        == times * 100
    )


def test_one_worker_sends_nothing():
    assert traffic.of_step(shape(100), setup(world=1)).sent_bytes == 0


@pytest.mark.parametrize("stage", range(4))
def test_frozen_weights_have_neither_gradients_nor_state(stage):
    model = shape((900, False), (100, True))
    gpu = of_worker(model, setup(stage=stage, world=1)).gpu
    assert (gpu["gradients"], gpu["optimizer"]) == (200, 1200)
    assert gpu["weights"] == 2000
    assert traffic.checkpoint_bytes(model, setup(world=2)) == {
        "checkpoint": 1200,
        "a worker's part": 600,
        "frozen, once a run": 1800,
        "exported model": 2000,
    }
    moved = traffic.of_step(model, setup(stage=3)).elements
    assert moved == {"gradients": 100, "weights": 2000}


@pytest.mark.parametrize("guards", [1, 2, 3])
def test_each_guard_is_a_float32_copy(guards):
    without, with_them = (
        of_worker(shape(6400), setup(guards=g)).gpu["optimizer"] for g in (0, guards)
    )
    assert with_them - without == 4 * guards * 100
    assert traffic.checkpoint_bytes(shape(100), setup(guards=guards))["checkpoint"] == 400 * (
        3 + guards
    )


def test_sgd_without_momentum_has_masters_only():
    assert of_worker(shape(6400), setup(optimizer="sgd", has_moments=False)).gpu["optimizer"] == 400
    assert of_worker(shape(6400), setup(optimizer="sgd")).gpu["optimizer"] == 800


def test_the_bucket_of_zero_2_is_not_there_in_forward():
    """So a forward may hold more than its backward and not be the peak."""
    model = shape(
        6400,
        added=Lane(Held(10**6, 500), Held(10**6, 0)),
        passed=Lane(Held(10**6, 500), Held(10**6, 0)),
    )
    found = {
        (stage, lanes): of_worker(
            model, setup(stage=stage, lanes=lanes, zero={"reduce_bucket_size": 10**4})
        )
        for stage in (1, 2, 3)
        for lanes in (1, 2)
    }
    assert {key: memory.when for key, memory in found.items()} == {
        (1, 1): "backward",
        (1, 2): "forward",
        (2, 1): "backward",
        (2, 2): "backward",
        (3, 1): "forward",
        (3, 2): "forward",
    }
    assert found[1, 2].total - found[1, 1].total == 500


def test_the_peak_is_among_lanes_or_at_the_update():
    """At the update a partition's gradients lie once more in float32; activations are gone."""
    small = of_worker(shape(6400), setup(stage=1, world=2))
    assert (small.when, small.gpu["buffers"]) == ("update", 4 * 3200)
    large = of_worker(shape(6400, added=MUCH), setup(stage=1, world=2))
    assert (large.when, large.gpu["activations"], large.gpu["logits"]) == ("forward", 10**6, 5)


def test_buckets_are_doubled_where_reductions_overlap():
    one, two = (
        of_worker(
            shape(64, added=MUCH),
            setup(stage=1, overlap=overlap, zero={"reduce_bucket_size": 1000}),
        ).gpu["buffers"]
        for overlap in (False, True)
    )
    assert (one, two) == (2000, 4000 + 2 * 64), "and what is in one, flat"


@pytest.mark.parametrize(
    ("bucket", "buffers"), [(10**4, 2 * 10**4), (100, 2 * 100 + 2 * 100 + 2 * 100)]
)
def test_small_models_of_zero_2_reduce_after_their_activations(bucket, buffers):
    """A full bucket is reduced at once, into a second partition where a lane was before."""
    model = shape(*[100] * 64, passed=MUCH)
    assert (
        of_worker(model, setup(stage=2, lanes=2, zero={"reduce_bucket_size": bucket})).gpu[
            "buffers"
        ]
        == buffers
    )


def test_zero_2_keeps_gradients_across_a_border_whole():
    """Of two workers each has half, 150: the first touches both weights of 100 and 200, the second that of 200."""
    model = shape(100, 200, added=MUCH, passed=MUCH)
    one, two = (of_worker(model, setup(stage=2, world=world)).gpu for world in (1, 2))
    assert (one["buffers"], one["gradients"]) == (0, 600)
    assert (two["buffers"], two["gradients"]) == (2 * (300 - 150), 300)


def test_offload_moves_state_to_the_host():
    memory = of_worker(shape(6400), setup(offload_optimizer="cpu", offload_param="cpu"))
    assert memory.host == {"optimizer": 1200, "gradients": 200, "weights": 200}
    assert memory.gpu["optimizer"] == memory.gpu["gradients"] == memory.gpu["weights"] == 0


def test_more_workers_never_need_more():
    model = shape(*[10**6] * 40)
    for stage in range(4):
        needs = [of_worker(model, setup(stage=stage, world=world)).total for world in (2, 4, 8, 64)]
        assert needs == sorted(needs, reverse=True)
