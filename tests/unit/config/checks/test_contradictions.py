"""Contradictions between fields: each line, word for word, and that lawful neighbours pass."""

from __future__ import annotations

import pytest

from dist_ft.config.checks import deepspeed_keys
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError

BASE = {
    "run": {"name": "x"},
    "model": {"path": "m", "dtype": "float32"},
    "data": {"train": "a.jsonl"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 10},
}


def refused(*overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(BASE, overrides)
    return list(caught.value.problems)


CASES = [
    (
        ["batch.global_batch=7", "batch.micro_batch=2"],
        "batch.global_batch=7: not a multiple of batch.micro_batch=2; a step is whole micro-batches; set it to 8 or change "
        "micro_batch",
    ),
    (
        ["cluster.workers=5"],
        "cluster.workers=5: more workers than the 4 lanes of a step (batch.global_batch / batch.micro_batch); at most 4; "
        "use fewer workers, or raise batch.global_batch",
    ),
    (
        ["cluster.workers=1..8", "checkpoint.every_steps=4"],
        "cluster.workers=[1, 8]: more workers than the 4 lanes of a step (batch.global_batch / batch.micro_batch); at most "
        "4; use fewer workers, or raise batch.global_batch",
    ),
    (
        ["cluster.workers=3..2"],
        "cluster.workers=[3, 2]: the fewest are more than the most; a range is [fewest, most]; write [2, 3]",
    ),
    (
        ["cluster.workers=-1"],
        "cluster.workers=-1: a number of workers can't be negative; 0 is this process without Ray, 1 or more are Ray "
        "workers; correct it",
    ),
    (
        ["schedule.steps=null"],
        "schedule.steps: neither steps nor epochs is set; a run needs one of them to know its end; set schedule.steps or "
        "schedule.epochs",
    ),
    (
        ["schedule.epochs=2"],
        "schedule.steps=10: schedule.epochs=2 is set too; one of them decides the length; remove the other",
    ),
    (
        ["schedule.warmup_steps=1", "schedule.warmup_ratio=0.1"],
        "schedule.warmup_steps=1: schedule.warmup_ratio=0.1 is set too; one of them is enough; remove the other",
    ),
    (
        ["schedule.warmup_steps=11"],
        "schedule.warmup_steps=11: longer than the run of schedule.steps=10; at most 10; lower it, or use "
        "schedule.warmup_ratio",
    ),
    (
        ["optimizer.name=adafactor", "cluster.workers=2", "zero.stage=2"],
        "optimizer.name=adafactor: with zero.stage=2 on Ray workers its update is not element-wise, so ZeRO's flat "
        "partitions change it (losses off by up to 4e-2); allowed with zero.stage=0 or cluster.workers=0; use "
        "optimizer.name=adamw, or one of those",
    ),
    (
        ["tuning.method=partial"],
        "tuning.method=partial: it does not say what learns; needs tuning.last_layers or tuning.trainable; set one, or "
        "tuning.method=full",
    ),
    (
        ["tuning.method=lora", "tuning.last_layers=2"],
        "tuning.last_layers=2: tuning.method=lora does not use it; allowed with tuning.method=partial; set that, or remove "
        "it",
    ),
    (
        ["tuning.trainable=lm_head.*"],
        "tuning.trainable: with tuning.method=full all weights learn; allowed with all other methods; set "
        "tuning.method=partial, or remove it",
    ),
    (
        ["tuning.method=ia3", "tuning.lora.rank=4"],
        "tuning.lora: tuning.method=ia3 does not use it; allowed with tuning.method=lora; set that, or remove it",
    ),
    (
        ["tuning.method=lora", "tuning.lora.targets=[all-linear, q_proj]"],
        "tuning.lora.targets=['all-linear', 'q_proj']: all-linear stands for a list of its own; allowed alone; remove it, or "
        "the others",
    ),
    (
        [
            "tuning.method=lora",
            "cluster.workers=2",
            "zero.stage=3",
            "zero.offload_param=nvme",
            "zero.nvme_path=/x",
        ],
        "zero.offload_param=nvme: weights that do not learn can not be read back from there (tuning); allowed where all learn; "
        "set zero.offload_param=cpu",
    ),
    (
        ["optimizer.momentum=0.9"],
        "optimizer.momentum=0.9: optimizer.name=adamw does not use it; only sgd does; remove it, or set optimizer.name=sgd",
    ),
    (
        ["optimizer.name=sgd", "optimizer.beta2=0.9"],
        "optimizer.beta2=0.9: optimizer.name=sgd does not use it; only adamw does; remove it, or set optimizer.name=adamw",
    ),
    (
        ["cluster.workers=2", "zero.stage=2", "zero.offload_param=cpu"],
        "zero.offload_param=cpu: weights can be offloaded only where they are sharded; needs zero.stage=3 (it is 2); set "
        "zero.stage=3, or offload_param to none",
    ),
    (
        ["cluster.workers=2", "zero.stage=0", "zero.offload_optimizer=cpu"],
        "zero.offload_optimizer=cpu: optimizer state can be offloaded only where it is sharded; needs zero.stage 1, 2 or 3 "
        "(it is 0); set zero.stage=1, or offload_optimizer to none",
    ),
    (
        ["cluster.workers=2", "zero.offload_param=nvme"],
        "zero.offload_param=nvme: zero.nvme_path is not set; a local folder on the disk is needed; set zero.nvme_path",
    ),
    (
        ["cluster.workers=2", "zero.stage=2", "zero.offload_optimizer=nvme", "zero.nvme_path=/n"],
        "zero.offload_optimizer=nvme: DeepSpeed offloads to nvme only at zero.stage=3 (it is 2); set zero.stage=3, or "
        "offload_optimizer=cpu",
    ),
    (
        ["zero.offload_optimizer=cpu"],
        "zero.offload_optimizer=cpu: offload is DeepSpeed's, and cluster.workers=0 runs without it; allowed: none; set "
        "cluster.workers to 1 or more, or offload_optimizer to none",
    ),
    (
        ["cluster.workers=2", "zero.stage=0", "model.dtype=bfloat16"],
        "zero.stage=0: not supported with model.dtype=bfloat16 on Ray workers (no float32 masters are reachable); allowed: "
        "stages 1 to 3; use zero.stage=1",
    ),
    (
        ["model.attention=flash_attention_2", "model.dtype=bfloat16"],
        "model.attention=flash_attention_2: flash attention runs on GPUs only; needs cluster.gpus_per_worker=1 (it is 0); "
        "set that, or model.attention=sdpa",
    ),
    (
        ["model.attention=flash_attention_3", "cluster.gpus_per_worker=1"],
        "model.attention=flash_attention_3: flash attention computes in 16 bits only; needs model.dtype=bfloat16 (it is "
        "float32); set that, or model.attention=sdpa",
    ),
    (
        ["cluster.workers=2", "run.storage=memory://runs"],
        "run.storage=memory://runs: memory belongs to one process, and Ray workers are others; allowed with "
        "cluster.workers=0; use a folder or an object store",
    ),
    (
        ["cluster.workers=2", "evaluation.data=memory://d"],
        "evaluation.data=memory://d: memory belongs to one process, and Ray workers are others; allowed with "
        "cluster.workers=0; use a folder or an object store",
    ),
    (
        ["data.overlong=split"],
        "data.overlong=split: only plain text can go on in a further sequence (data.format=auto); allowed: error, "
        "truncate, drop; choose one of those, or set data.format=text",
    ),
    (
        [
            "checkpoint.every_steps=4",
            "checkpoint.keep_best=2",
            "evaluation.data=b.jsonl",
            "evaluation.every_steps=3",
        ],
        "checkpoint.keep_best=2: needs an evaluation at every checkpoint; allowed with evaluation.data and a "
        "checkpoint.every_steps (4) that is a multiple of evaluation.every_steps (3); set them so",
    ),
    (
        ["checkpoint.every_steps=4", "checkpoint.keep_every_steps=6"],
        "checkpoint.keep_every_steps=6: not a multiple of checkpoint.every_steps=4, so such steps are never saved; a "
        "multiple of checkpoint.every_steps, or 0, is allowed; change one of them",
    ),
    (
        ["checkpoint.keep_every_steps=6"],
        "checkpoint.keep_every_steps=6: checkpoint.every_steps is 0, so such steps are never saved; a multiple of "
        "checkpoint.every_steps, or 0, is allowed; change one of them",
    ),
    (
        ["evaluation.every_steps=5"],
        "evaluation.every_steps=5: there is nothing to evaluate on; needs evaluation.data; set it, or leave every_steps "
        "out",
    ),
    (
        ["zero.deepspeed.train_micro_batch_size_per_gpu=2"],
        "zero.deepspeed.train_micro_batch_size_per_gpu: dist_ft sets this itself; allowed: DeepSpeed keys it does not set; "
        "remove it; set batch.micro_batch",
    ),
    (
        ["zero.deepspeed.zero_optimization.stage=2"],
        "zero.deepspeed.zero_optimization.stage: dist_ft sets this itself; allowed: DeepSpeed keys it does not set; remove "
        "it; set zero.stage",
    ),
    (
        ["zero.deepspeed.zero_optimization.offload_param.device=cpu"],
        "zero.deepspeed.zero_optimization.offload_param.device: dist_ft sets this itself; allowed: DeepSpeed keys it does "
        "not set; remove it; set zero.offload_param",
    ),
    (
        ["zero.deepspeed.wall_clock_brekdown=true"],
        "zero.deepspeed.wall_clock_brekdown: DeepSpeed has no such key; did you mean wall_clock_breakdown?",
    ),
    (
        ["zero.deepspeed.zero_optimisation.overlap_comm=true"],
        "zero.deepspeed.zero_optimisation: DeepSpeed has no such key; did you mean zero_optimization?",
    ),
    (
        ["zero.deepspeed.zero_optimization.reduce_bucket_sizes=1"],
        "zero.deepspeed.zero_optimization.reduce_bucket_sizes: DeepSpeed has no such key; did you mean reduce_bucket_size?",
    ),
    (
        ["storage.options.s3.secret=hush"],
        "storage.options.s3.secret: looks like a credential, and a config is stored with the run; credentials come from "
        "the environment; remove it and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        ["storage.options.sftp.password=hush"],
        "storage.options.sftp.password: looks like a credential, and a config is stored with the run; credentials come "
        "from the environment; remove it and set FSSPEC_SFTP_PASSWORD",
    ),
    (
        ["storage.options.s3.client_kwargs.aws_secret_access_key=hush"],
        "storage.options.s3.client_kwargs.aws_secret_access_key: looks like a credential, and a config is stored with the "
        "run; credentials come from the environment; remove it and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    (
        ["run.storage=s3://me:hush@host/bucket"],
        "run.storage: the URL holds a user name, password or token before its host; URLs without are allowed; remove it "
        "and set the credentials in the environment",
    ),
    (
        ["data.train=https://hf_hush@host/d.jsonl"],
        "data.train.0.path: the URL holds a user name, password or token before its host; URLs without are allowed; remove "
        "it and set the credentials in the environment",
    ),
    (
        ["data.train=[a, 'https://h/d.jsonl?X-Amz-Signature=hush']"],
        "data.train.1.path: the URL holds a signature, token or key; URLs without one are allowed; remove it and set the "
        "credentials in the environment",
    ),
    *[
        (
            [f"model.path=https://h/m?a=1&{name}=hush"],
            "model.path: the URL holds a signature, token or key; URLs without one are allowed; remove it and set the "
            "credentials in the environment",
        )
        for name in ("access_token", "api_key", "password", "token", "sig")
    ],
    (
        ["cluster.workers=1..4"],
        "cluster.workers=[1, 4]: when a node is lost, the others go on from the newest checkpoint, and "
        "checkpoint.every_steps is 0; a range needs checkpoints; set checkpoint.every_steps",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_contradictions(overrides, line):
    lines = refused(*overrides)
    assert lines == [line]
    assert "hush" not in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster.workers=4"],
        ["cluster.workers=1..4", "checkpoint.every_steps=4"],
        ["cluster.workers=4..4"],
        ["schedule.steps=null", "schedule.epochs=1", "schedule.warmup_steps=50"],
        ["schedule.warmup_steps=10"],
        ["tuning.method=partial", "tuning.last_layers=2"],
        ["tuning.method=lora", "tuning.lora.targets=[q_proj, v_proj]"],
        ["tuning.method=lora", "tuning.trainable='*norm*'"],
        ["tuning.frozen='*embed*'"],
        ["optimizer.name=adafactor"],
        ["optimizer.name=adafactor", "cluster.workers=2", "zero.stage=0"],
        ["optimizer.name=sgd", "optimizer.momentum=0.9"],
        [
            "cluster.workers=2",
            "zero.offload_param=nvme",
            "zero.offload_optimizer=cpu",
            "zero.nvme_path=/n",
        ],
        ["cluster.workers=2", "zero.stage=1", "zero.offload_optimizer=cpu"],
        ["zero.stage=0", "model.dtype=bfloat16"],
        [
            "model.attention=flash_attention_2",
            "model.dtype=bfloat16",
            "cluster.gpus_per_worker=1",
            "cluster.workers=2",
        ],
        ["run.storage=memory://runs"],
        ["data.overlong=split", "data.format=text"],
        ["checkpoint.every_steps=4", "checkpoint.keep_every_steps=8"],
        [
            "checkpoint.every_steps=4",
            "checkpoint.keep_best=2",
            "evaluation.data=b.jsonl",
            "evaluation.every_steps=2",
        ],
        ["evaluation.every_steps=5", "evaluation.data=b.jsonl"],
        [
            "zero.deepspeed.zero_optimization.overlap_comm=true",
            "zero.deepspeed.zero_optimization.offload_param.pin_memory=1",
        ],
        ["zero.deepspeed.a_key_of_a_newer_version=1"],
        ["storage.options.s3={endpoint_url: 'http://127.0.0.1:5000', anon: true}"],
    ],
)
def test_lawful_neighbours(overrides):
    load_config(BASE, overrides)


def test_deepspeed_keys_agree_with_the_installed_one():
    """A key DeepSpeed reads that is neither known nor owned would be taken for a misspelling of another."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    owned = {
        path.split(".")[1] for path in deepspeed_keys.OWNED if path.startswith("zero_optimization.")
    }
    assert fields - deepspeed_keys.KNOWN_ZERO - owned == set()
    assert deepspeed_keys.KNOWN_ZERO - fields == set()
    assert not deepspeed_keys.KNOWN & deepspeed_keys.OWNED.keys()


@pytest.mark.parametrize(
    ("train", "more", "said"),
    [
        (
            [{"path": "a", "weight": 1}, {"path": "b"}],
            {},
            "data.train: b has no weight and others have; either all sources have one",
        ),
        (
            [{"path": "a", "weight": 1, "repeat": 2}, {"path": "b", "weight": 1}],
            {},
            "data.train: weight and repeat are both set",
        ),
        (
            [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}],
            {"temperature": 2},
            "data.temperature=2.0: weight or repeat of a source is set too",
        ),
        (
            ["a", "b"],
            {"mixing": [{"until_step": 5, "weights": [1]}]},
            "data.mixing.0.weights=[1.0]: data.train has 2 sources; one weight for each is needed, and one above 0",
        ),
        (
            ["a", "b"],
            {"mixing": [{"until_step": 5, "weights": [0, 0]}]},
            "data.mixing.0.weights=[0.0, 0.0]: data.train has 2",
        ),
        (
            ["a"],
            {"mixing": [{"until_step": 9, "weights": [1]}, {"until_step": 9, "weights": [1]}]},
            "data.mixing: until_step goes 9, 9; they must rise from 1 on",
        ),
        (
            [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}],
            {},
            "data.train: two sources are named x",
        ),
    ],
)
def test_mixing_that_contradicts_itself(train, more, said):
    with pytest.raises(ConfigError) as caught:
        load_config({**BASE, "data": {"train": train, **more}})
    assert said in str(caught.value)


def test_placement_and_network_settings_that_contradict():
    base = {
        "run": {"name": "x"},
        "model": {"path": "m"},
        "data": {"train": "a"},
        "batch": {"global_batch": 4, "sequence_length": 8},
        "schedule": {"steps": 3},
    }

    def said(**cluster):
        with pytest.raises(ConfigError) as caught:
            load_config({**base, "cluster": cluster})
        return list(caught.value.problems)

    assert said(workers=2, workers_per_node=2, placement="SPREAD") == [
        "cluster.workers_per_node=2: cluster.placement=SPREAD says too how workers are spread; one of them decides; set "
        "cluster.placement=PACK, or workers_per_node=0"
    ]
    assert said(workers_per_node=2) == [
        "cluster.workers_per_node=2: cluster.workers=0 is this process alone; allowed with Ray "
        "workers; set cluster.workers, or leave it out"
    ]
    assert said(
        workers=2, network_interface="eth0", network_variables={"NCCL_SOCKET_IFNAME": "eth1"}
    ) == [
        "cluster.network_variables.NCCL_SOCKET_IFNAME: cluster.network_interface=eth0 sets it; one of them is allowed; remove the other"
    ]
    assert said(workers=2, network_variables={"LD_PRELOAD": "x"})[0].startswith(
        "cluster.network_variables.LD_PRELOAD: is no variable of nccl, gloo, UCX or libfabric; names that begin with NCCL_"
    )
    assert said(workers=2, network_interface="eth 0") == [
        "cluster.network_interface=eth 0: not of the allowed form; allowed: names of network interfaces with commas between, such as "
        "eth0; correct it, or leave it out for the default (null)"
    ]
