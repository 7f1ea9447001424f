"""The terms of the ZeRO paper, and what DeepSpeed holds in addition."""

import dataclasses

import pytest

from dist_ft.planning import traffic
from dist_ft.planning.model_shape import LanePeaks, ModelShape, PeakBytes, WeightShape
from dist_ft.planning.worker_memory import WorkerSetup, peak_memory

PSI = 7_500_000_000
NO_PEAKS = LanePeaks(PeakBytes(0, 0), PeakBytes(0, 0))
LARGE_PEAKS = LanePeaks(PeakBytes(10**6, 5), PeakBytes(10**6, 5))


def shape(*weights, added=NO_PEAKS, passed=NO_PEAKS):
    weight_shapes = tuple(
        WeightShape(f"w{i}", *(w if isinstance(w, tuple) else (w,))) for i, w in enumerate(weights)
    )
    return ModelShape(
        "x", weight_shapes, tuple((i,) for i in range(len(weight_shapes))), added, passed
    )


def setup(**given):
    base = WorkerSetup(
        world=64,
        stage=3,
        dtype="bfloat16",
        optimizer="adamw",
        num_weight_copies=0,
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
def test_model_state_matches_the_paper(stage, world):
    """2 psi + 2 psi + K psi with K = 12 (arXiv:1910.02054, figure 1), partitioned by stage."""
    psi, k = 1024 * 7_000_000, 12
    expected = {
        0: (2 + 2 + k) * psi,
        1: (2 + 2) * psi + k * psi // world,
        2: 2 * psi + (2 + k) * psi // world,
        3: (2 + 2 + k) * psi // world,
    }[stage]
    gpu = peak_memory(shape(psi), setup(stage=stage, world=world)).gpu
    assert gpu["weights"] + gpu["gradients"] + gpu["optimizer"] == expected


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_traffic_matches_the_paper(stage, times):
    """Section 7: 2 psi up to ZeRO-2, 3 psi with ZeRO-3."""
    moved = traffic.step_traffic(shape(PSI), setup(stage=stage))
    assert sum(moved.elements.values()) == times * PSI
    assert moved.sent_bytes == times * PSI * 2 * 63 // 64


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_deepspeed_reduces_by_all_reduce(stage, times):
    moved = traffic.step_traffic(shape(PSI), setup(stage=stage))
    assert moved.sent_by_deepspeed_bytes == times * PSI * 2 * 63 // 64


@pytest.mark.parametrize(("stage", "times"), [(1, 2), (2, 5), (3, 12)])
def test_each_lane_reduces_from_stage_2_on(stage, times):
    assert (
        sum(traffic.step_traffic(shape(100), setup(stage=stage, lanes=4)).elements.values())
        == times * 100
    )


def test_one_worker_sends_nothing():
    assert traffic.step_traffic(shape(100), setup(world=1)).sent_bytes == 0


@pytest.mark.parametrize("stage", range(4))
def test_frozen_weights_have_neither_gradients_nor_state(stage):
    model = shape((900, False), (100, True))
    gpu = peak_memory(model, setup(stage=stage, world=1)).gpu
    assert (gpu["gradients"], gpu["optimizer"]) == (200, 1200)
    assert gpu["weights"] == 2000
    assert traffic.checkpoint_bytes(model, setup(world=2)) == {
        "checkpoint": 1200,
        "per_worker": 600,
        "frozen": 1800,
        "exported_model": 2000,
    }
    moved = traffic.step_traffic(model, setup(stage=3)).elements
    assert moved == {"gradients": 100, "weights": 2000}


@pytest.mark.parametrize("num_copies", [1, 2, 3])
def test_weight_copies_are_float32(num_copies):
    without, with_them = (
        peak_memory(shape(6400), setup(num_weight_copies=copies)).gpu["optimizer"]
        for copies in (0, num_copies)
    )
    assert with_them - without == 4 * num_copies * 100
    assert traffic.checkpoint_bytes(shape(100), setup(num_weight_copies=num_copies))[
        "checkpoint"
    ] == 400 * (3 + num_copies)


def test_sgd_without_momentum_has_masters_only():
    assert (
        peak_memory(shape(6400), setup(optimizer="sgd", has_moments=False)).gpu["optimizer"] == 400
    )
    assert peak_memory(shape(6400), setup(optimizer="sgd")).gpu["optimizer"] == 800


def test_forward_of_zero_2_has_no_bucket():
    """So the forward pass may hold more activations than the backward pass and not be the peak."""
    model = shape(
        6400,
        added=LanePeaks(PeakBytes(10**6, 500), PeakBytes(10**6, 0)),
        passed=LanePeaks(PeakBytes(10**6, 500), PeakBytes(10**6, 0)),
    )
    found = {
        (stage, lanes): peak_memory(
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


def test_peak_is_in_a_lane_or_at_the_update():
    """At the update, a partition's gradients exist again in float32, without activations."""
    small = peak_memory(shape(6400), setup(stage=1, world=2))
    assert (small.when, small.gpu["buffers"]) == ("update", 4 * 3200)
    large = peak_memory(shape(6400, added=LARGE_PEAKS), setup(stage=1, world=2))
    assert (large.when, large.gpu["activations"], large.gpu["logits"]) == ("forward", 10**6, 5)


def test_overlap_doubles_the_buckets():
    one, two = (
        peak_memory(
            shape(64, added=LARGE_PEAKS),
            setup(stage=1, overlap=overlap, zero={"reduce_bucket_size": 1000}),
        ).gpu["buffers"]
        for overlap in (False, True)
    )
    assert (one, two) == (2000, 4000 + 2 * 64), "plus a flat copy of one"


@pytest.mark.parametrize(
    ("bucket", "buffers"), [(10**4, 2 * 10**4), (100, 2 * 100 + 2 * 100 + 2 * 100)]
)
def test_small_models_of_zero_2_reduce_after_their_activations(bucket, buffers):
    """A full bucket is reduced at once, with several lanes into a second partition."""
    model = shape(*[100] * 64, passed=LARGE_PEAKS)
    assert (
        peak_memory(model, setup(stage=2, lanes=2, zero={"reduce_bucket_size": bucket})).gpu[
            "buffers"
        ]
        == buffers
    )


def test_zero_2_stores_gradients_across_a_border_whole():
    """Each of two workers has 150: the first holds parts of both weights, the second of one."""
    model = shape(100, 200, added=LARGE_PEAKS, passed=LARGE_PEAKS)
    one, two = (peak_memory(model, setup(stage=2, world=world)).gpu for world in (1, 2))
    assert (one["buffers"], one["gradients"]) == (0, 600)
    assert (two["buffers"], two["gradients"]) == (2 * (300 - 150), 300)


def test_offload_moves_state_to_the_host():
    memory = peak_memory(shape(6400), setup(offload_optimizer="cpu", offload_param="cpu"))
    assert memory.host == {"optimizer": 1200, "gradients": 200, "weights": 200}
    assert memory.gpu["optimizer"] == memory.gpu["gradients"] == memory.gpu["weights"] == 0


def test_more_workers_never_need_more_memory_each():
    model = shape(*[10**6] * 40)
    for stage in range(4):
        needs = [
            peak_memory(model, setup(stage=stage, world=world)).total for world in (2, 4, 8, 64)
        ]
        assert needs == sorted(needs, reverse=True)
