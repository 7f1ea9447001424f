"""The DeepSpeed config follows from the run's config."""

from __future__ import annotations

import pytest
from unit.small import run_config

from dist_ft.engine.deepspeed_config import BUCKET_ELEMENTS, build_deepspeed_config, merge


def built(**sections):
    return build_deepspeed_config(
        run_config("runs", cluster={"workers": 2, **sections.pop("cluster", {})}, **sections)
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_settings_by_stage(stage):
    config = built(
        zero={"stage": stage}, batch={"micro_batch": 2}, optimizer={"max_grad_norm": 0.7}
    )
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (
        2,
        1,
    )
    assert "train_batch_size" not in config
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"]["stage"] == stage
    buckets = {
        key: value
        for key, value in config["zero_optimization"].items()
        if key.endswith("bucket_size")
    }
    assert buckets == (
        {"reduce_bucket_size": BUCKET_ELEMENTS, "allgather_bucket_size": BUCKET_ELEMENTS}
        if stage
        else {}
    )
    assert config["zero_allow_untested_optimizer"] and not config["zero_force_ds_cpu_optimizer"]
    assert "optimizer" not in config and "scheduler" not in config


@pytest.mark.parametrize(("dtype", "enabled"), [("float32", False), ("bfloat16", True)])
def test_dtype_settings(dtype, enabled):
    assert built(model={"dtype": dtype})["bf16"] == {"enabled": enabled}


@pytest.mark.parametrize("gpus", [0, 1])
def test_offload_settings(gpus):
    zero = built(
        zero={"offload_optimizer": "nvme", "offload_param": "cpu", "nvme_path": "/nvme"},
        cluster={"gpus_per_worker": gpus},
    )["zero_optimization"]
    assert zero["offload_optimizer"] == {
        "device": "nvme",
        "pin_memory": bool(gpus),
        "nvme_path": "/nvme",
    }
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": bool(gpus)}
    assert zero["overlap_comm"] == bool(gpus)
    assert not {"offload_optimizer", "offload_param"} & set(built()["zero_optimization"])


def test_keys_of_the_config_override_the_defaults():
    config = built(
        zero={
            "deepspeed": {
                "zero_optimization": {"reduce_bucket_size": 5, "sub_group_size": 7},
                "comms_logger": {"enabled": True},
                "wall_clock_breakdown": True,
            }
        }
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 5
    assert config["zero_optimization"]["sub_group_size"] == 7
    assert config["zero_optimization"]["allgather_bucket_size"] == BUCKET_ELEMENTS
    assert config["zero_optimization"]["stage"] == 3
    assert config["comms_logger"] == {"enabled": True} and config["wall_clock_breakdown"] is True


def test_merge_does_not_change_its_arguments():
    base, extra = {"a": {"b": 1}, "c": 2}, {"a": {"d": {"e": 3}}, "c": {"f": 4}}
    assert merge(base, extra) == {"a": {"b": 1, "d": {"e": 3}}, "c": {"f": 4}}
    assert (base, extra) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": {"e": 3}}, "c": {"f": 4}})
