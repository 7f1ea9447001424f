"""Contradictions between fields: the exact text of each line, and similar configs that are valid."""

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
        "batch.global_batch=7: not a multiple of batch.micro_batch=2. A step has whole "
        "micro-batches. Set it to 8 or change micro_batch.",
    ),
    (
        ["cluster.workers=5"],
        "cluster.workers=5: more workers than the 4 lanes (batch.global_batch / "
        "batch.micro_batch). Use at most 4 workers or raise batch.global_batch.",
    ),
    (
        ["cluster.workers=1..8", "checkpoint.every_steps=4"],
        "cluster.workers=[1, 8]: more workers than the 4 lanes (batch.global_batch / "
        "batch.micro_batch). Use at most 4 workers or raise batch.global_batch.",
    ),
    (
        ["cluster.workers=3..2"],
        "cluster.workers=[3, 2]: the minimum is above the maximum. A range is [min, max]. Write "
        "[2, 3].",
    ),
    (
        ["cluster.workers=-1"],
        "cluster.workers=-1: the number of workers is negative. 0 is this process without Ray, 1 "
        "or more are Ray workers. Correct it.",
    ),
    (
        ["cluster.collective_timeout_s=600"],
        "cluster.collective_timeout_s=600: shorter than cluster.progress_timeout_s=1800, so nccl "
        "would end all workers before the one that hangs is named. At least progress_timeout_s is "
        "allowed. Raise it, or lower cluster.progress_timeout_s to 600.",
    ),
    (
        ["cluster.network_variables={TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC: '480'}"],
        "cluster.network_variables.TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=480: shorter than "
        "cluster.progress_timeout_s=1800, so torch would end a worker before it is named. At "
        "least progress_timeout_s is allowed. Raise it, or remove it: dist_ft sets it.",
    ),
    (
        ["cluster.network_variables={TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC: soon}"],
        "cluster.network_variables.TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=soon: not a whole number of "
        "seconds. Allowed: digits. Correct it, or remove it.",
    ),
    (
        ["cluster.avoid_nodes=[a, b]"],
        "cluster.avoid_nodes=[a, b]: cluster.workers=0 is a single process. Allowed with Ray "
        "workers. Set cluster.workers, or remove it.",
    ),
    (
        ["cluster.workers=2", "cluster.avoid_nodes=[a]", "cluster.labels={ray.io/node-id: x}"],
        "cluster.avoid_nodes=[a]: cluster.labels.ray.io/node-id also chooses nodes. Only one of "
        "them is allowed. Remove the other.",
    ),
    (
        ["log.notify.webhook_env=https://hooks.example.com/T000/secret"],
        "log.notify.webhook_env: not the name of an environment variable. Allowed: letters, "
        "digits and '_', such as DIST_FT_WEBHOOK. Set a variable to the URL, and write its name "
        "here.",
    ),
    (
        ["log.notify.command=[curl, 'https://hooks.example.com/T000/secret']"],
        "log.notify.command: a word holds a URL, which may be a secret, and a config is stored "
        "with the run. Allowed: URLs in the environment. Set log.notify.webhook_env to the name "
        "of a variable, or have a script read one.",
    ),
    (
        ["log.notify.command=['']"],
        "log.notify.command: its first word, the program, is empty. Allowed: a list of words such "
        "as [./notify.sh, me]. Correct it.",
    ),
    (
        ["run.max_cost=9"],
        "run.max_cost=9: cluster.cost_per_hour is 0, so no cost is ever reached. Needs the cost of "
        "a worker for an hour. Set cluster.cost_per_hour, or use run.max_hours.",
    ),
    (
        ["schedule.steps=null"],
        "schedule.steps: neither steps nor epochs is set. One of them is needed as the length of "
        "the run. Set schedule.steps or schedule.epochs.",
    ),
    (
        ["schedule.epochs=2"],
        "schedule.steps=10: schedule.epochs=2 is also set. Only one of them is allowed. Remove "
        "the other.",
    ),
    (
        ["schedule.warmup_steps=1", "schedule.warmup_ratio=0.1"],
        "schedule.warmup_steps=1: schedule.warmup_ratio=0.1 is also set. Only one of them is "
        "allowed. Remove the other.",
    ),
    (
        ["schedule.warmup_steps=11"],
        "schedule.warmup_steps=11: longer than the run of schedule.steps=10. At most 10 is "
        "allowed. Lower it, or use schedule.warmup_ratio.",
    ),
    (
        ["optimizer.name=adafactor", "cluster.workers=2", "zero.stage=2"],
        "optimizer.name=adafactor: with zero.stage=2 on Ray workers ZeRO's flat partitions change "
        "its update, which is not element-wise (losses differ by up to 4e-2). Allowed with "
        "zero.stage=0 or cluster.workers=0. Use optimizer.name=adamw, or one of those.",
    ),
    (
        ["tuning.method=partial"],
        "tuning.method=partial: no weights to train are named. Needs tuning.last_layers or "
        "tuning.trainable. Set one, or tuning.method=full.",
    ),
    (
        ["tuning.method=lora", "tuning.last_layers=2"],
        "tuning.last_layers=2: not used by tuning.method=lora. Allowed with "
        "tuning.method=partial. Set that, or remove it.",
    ),
    (
        ["tuning.trainable=lm_head.*"],
        "tuning.trainable: tuning.method=full trains all weights. Allowed with all other methods. "
        "Set tuning.method=partial, or remove it.",
    ),
    (
        ["tuning.method=ia3", "tuning.lora.rank=4"],
        "tuning.lora: not used by tuning.method=ia3. Allowed with tuning.method=lora. Set that, "
        "or remove it.",
    ),
    (
        ["tuning.method=lora", "tuning.lora.targets=[all-linear, q_proj]"],
        "tuning.lora.targets=['all-linear', 'q_proj']: all-linear stands for a list of layers. It "
        "is allowed alone. Remove it, or the others.",
    ),
    (
        [
            "tuning.method=lora",
            "cluster.workers=2",
            "zero.stage=3",
            "zero.offload_param=nvme",
            "zero.nvme_path=/x",
        ],
        "zero.offload_param=nvme: frozen weights (section tuning) cannot be read back from nvme. "
        "Allowed if all weights are trained. Set zero.offload_param=cpu.",
    ),
    (
        ["optimizer.momentum=0.9"],
        "optimizer.momentum=0.9: not used by optimizer.name=adamw. Allowed with sgd. Remove it, "
        "or set optimizer.name=sgd.",
    ),
    (
        ["optimizer.name=sgd", "optimizer.beta2=0.9"],
        "optimizer.beta2=0.9: not used by optimizer.name=sgd. Allowed with adamw. Remove it, or "
        "set optimizer.name=adamw.",
    ),
    (
        ["cluster.workers=2", "zero.stage=2", "zero.offload_param=cpu"],
        "zero.offload_param=cpu: only sharded weights can be offloaded. Needs zero.stage=3 (now "
        "2). Set zero.stage=3, or offload_param to none.",
    ),
    (
        ["cluster.workers=2", "zero.stage=0", "zero.offload_optimizer=cpu"],
        "zero.offload_optimizer=cpu: only sharded optimizer state can be offloaded. Needs "
        "zero.stage 1, 2 or 3 (now 0). Set zero.stage=1, or offload_optimizer to none.",
    ),
    (
        ["cluster.workers=2", "zero.offload_param=nvme"],
        "zero.offload_param=nvme: zero.nvme_path is not set. A local folder on the disk is "
        "needed. Set zero.nvme_path.",
    ),
    (
        ["cluster.workers=2", "zero.stage=2", "zero.offload_optimizer=nvme", "zero.nvme_path=/n"],
        "zero.offload_optimizer=nvme: DeepSpeed offloads to nvme only at zero.stage=3 (now 2). "
        "Set zero.stage=3, or offload_optimizer=cpu.",
    ),
    (
        ["zero.offload_optimizer=cpu"],
        "zero.offload_optimizer=cpu: DeepSpeed does the offload, and cluster.workers=0 runs "
        "without it. Allowed: none. Set cluster.workers to 1 or more, or offload_optimizer to "
        "none.",
    ),
    (
        ["cluster.workers=2", "zero.stage=0", "model.dtype=bfloat16"],
        "zero.stage=0: not supported with model.dtype=bfloat16 on Ray workers (no float32 master "
        "weights are accessible). Allowed: stages 1 to 3. Use zero.stage=1.",
    ),
    (
        ["model.attention=flash_attention_2", "model.dtype=bfloat16"],
        "model.attention=flash_attention_2: flash attention runs on GPUs only. Needs "
        "cluster.gpus_per_worker=1 (now 0). Set that, or model.attention=sdpa.",
    ),
    (
        ["model.attention=flash_attention_3", "cluster.gpus_per_worker=1"],
        "model.attention=flash_attention_3: flash attention computes in 16 bits only. Needs "
        "model.dtype=bfloat16 (now float32). Set that, or model.attention=sdpa.",
    ),
    (
        ["cluster.workers=2", "run.storage=memory://runs"],
        "run.storage=memory://runs: memory belongs to one process, and Ray workers are other "
        "processes. Allowed with cluster.workers=0. Use a folder or an object store.",
    ),
    (
        ["cluster.workers=2", "evaluation.data=memory://d"],
        "evaluation.data=memory://d: memory belongs to one process, and Ray workers are other "
        "processes. Allowed with cluster.workers=0. Use a folder or an object store.",
    ),
    (
        ["data.overlong=split"],
        "data.overlong=split: only plain text can be split (data.format=auto). Allowed: error, "
        "truncate, drop. Use one of those, or set data.format=text.",
    ),
    (
        [
            "checkpoint.every_steps=4",
            "checkpoint.keep_best=2",
            "evaluation.data=b.jsonl",
            "evaluation.every_steps=3",
        ],
        "checkpoint.keep_best=2: needs an evaluation at every checkpoint. Allowed with "
        "evaluation.data and a checkpoint.every_steps (4) that is a multiple of "
        "evaluation.every_steps (3). Set them accordingly.",
    ),
    (
        ["checkpoint.every_steps=4", "checkpoint.keep_every_steps=6"],
        "checkpoint.keep_every_steps=6: not a multiple of checkpoint.every_steps=4, so such steps "
        "are never saved. Allowed: a multiple of checkpoint.every_steps, or 0. Change one of them.",
    ),
    (
        ["checkpoint.keep_every_steps=6"],
        "checkpoint.keep_every_steps=6: checkpoint.every_steps is 0, so such steps are never "
        "saved. Allowed: a multiple of checkpoint.every_steps, or 0. Change one of them.",
    ),
    (
        ["evaluation.every_steps=5"],
        "evaluation.every_steps=5: there is no data to evaluate on. Needs evaluation.data. Set "
        "it, or remove every_steps.",
    ),
    (
        ["zero.deepspeed.train_micro_batch_size_per_gpu=2"],
        "zero.deepspeed.train_micro_batch_size_per_gpu: dist_ft sets this key itself. Allowed: "
        "DeepSpeed keys that it does not set. Remove it. Set batch.micro_batch.",
    ),
    (
        ["zero.deepspeed.zero_optimization.stage=2"],
        "zero.deepspeed.zero_optimization.stage: dist_ft sets this key itself. Allowed: DeepSpeed "
        "keys that it does not set. Remove it. Set zero.stage.",
    ),
    (
        ["zero.deepspeed.zero_optimization.offload_param.device=cpu"],
        "zero.deepspeed.zero_optimization.offload_param.device: dist_ft sets this key itself. "
        "Allowed: DeepSpeed keys that it does not set. Remove it. Set zero.offload_param.",
    ),
    (
        ["zero.deepspeed.wall_clock_brekdown=true"],
        "zero.deepspeed.wall_clock_brekdown: no such key in DeepSpeed. Did you mean "
        "wall_clock_breakdown?",
    ),
    (
        ["zero.deepspeed.zero_optimisation.overlap_comm=true"],
        "zero.deepspeed.zero_optimisation: no such key in DeepSpeed. Did you mean "
        "zero_optimization?",
    ),
    (
        ["zero.deepspeed.zero_optimization.reduce_bucket_sizes=1"],
        "zero.deepspeed.zero_optimization.reduce_bucket_sizes: no such key in DeepSpeed. Did you "
        "mean reduce_bucket_size?",
    ),
    (
        ["storage.options.s3.secret=hush"],
        "storage.options.s3.secret: looks like a credential, and a config is stored with the run. "
        "Credentials come from the environment. Remove it and set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY.",
    ),
    (
        ["storage.options.sftp.password=hush"],
        "storage.options.sftp.password: looks like a credential, and a config is stored with the "
        "run. Credentials come from the environment. Remove it and set FSSPEC_SFTP_PASSWORD.",
    ),
    (
        ["storage.options.s3.client_kwargs.aws_secret_access_key=hush"],
        "storage.options.s3.client_kwargs.aws_secret_access_key: looks like a credential, and a "
        "config is stored with the run. Credentials come from the environment. Remove it and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    ),
    (
        ["run.storage=s3://me:hush@host/bucket"],
        "run.storage: the URL has a user name, password or token before its host. Allowed: URLs "
        "without one. Remove it and set the credentials in the environment.",
    ),
    (
        ["data.train=https://hf_hush@host/d.jsonl"],
        "data.train: the URL has a user name, password or token before its host. Allowed: URLs "
        "without one. Remove it and set the credentials in the environment.",
    ),
    (
        ["data.train=[a, 'https://h/d.jsonl?X-Amz-Signature=hush']"],
        "data.train.1: the URL has a signature, token or key. Allowed: URLs without one. "
        "Remove it and set the credentials in the environment.",
    ),
    *[
        (
            [f"model.path=https://h/m?a=1&{name}=hush"],
            "model.path: the URL has a signature, token or key. Allowed: URLs without one. Remove "
            "it and set the credentials in the environment.",
        )
        for name in ("access_token", "api_key", "password", "token", "sig")
    ],
    (
        ["cluster.workers=1..4"],
        "cluster.workers=[1, 4]: after the loss of a node the others resume from the latest "
        "checkpoint, but checkpoint.every_steps is 0. A range needs checkpoints. Set "
        "checkpoint.every_steps.",
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
def test_similar_configs_are_valid(overrides):
    load_config(BASE, overrides)


def test_deepspeed_keys_are_those_of_the_installed_version():
    """A key of DeepSpeed that is not listed would be taken for a misspelling of another."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {info.alias or name for name, info in DeepSpeedZeroConfig.model_fields.items()}
    owned = {
        path.split(".")[1] for path in deepspeed_keys.OWNED if path.startswith("zero_optimization.")
    }
    assert fields - deepspeed_keys.KNOWN_ZERO - owned == set()
    assert deepspeed_keys.KNOWN_ZERO - fields == set()
    assert not deepspeed_keys.KNOWN & deepspeed_keys.OWNED.keys()


@pytest.mark.parametrize(
    ("train", "more", "expected"),
    [
        (
            [{"path": "a", "weight": 1}, {"path": "b"}],
            {},
            "data.train: b has no weight and others have. Either all sources have one",
        ),
        (
            [{"path": "a", "weight": 1, "repeat": 2}, {"path": "b", "weight": 1}],
            {},
            "data.train: weight and repeat are both set",
        ),
        (
            [{"path": "a", "weight": 1}, {"path": "b", "weight": 1}],
            {"temperature": 2},
            "data.temperature=2.0: weight or repeat of a source is also set",
        ),
        (
            ["a", "b"],
            {"mixing": [{"until_step": 5, "weights": [1]}]},
            "data.mixing.0.weights=[1.0]: data.train has 2 sources. Needed: one weight for each, and one above 0",
        ),
        (
            ["a", "b"],
            {"mixing": [{"until_step": 5, "weights": [0, 0]}]},
            "data.mixing.0.weights=[0.0, 0.0]: data.train has 2",
        ),
        (
            ["a"],
            {"mixing": [{"until_step": 9, "weights": [1]}, {"until_step": 9, "weights": [1]}]},
            "data.mixing: until_step is 9, 9. Steps must start at 1 or later and increase",
        ),
        (
            [{"path": "a", "name": "x"}, {"path": "b", "name": "x"}],
            {},
            "data.train: two sources are named x",
        ),
    ],
)
def test_contradictory_mixing(train, more, expected):
    with pytest.raises(ConfigError) as caught:
        load_config({**BASE, "data": {"train": train, **more}})
    assert expected in str(caught.value)


def test_contradictory_placement_and_network_settings():
    base = {
        "run": {"name": "x"},
        "model": {"path": "m"},
        "data": {"train": "a"},
        "batch": {"global_batch": 4, "sequence_length": 8},
        "schedule": {"steps": 3},
    }

    def cluster_problems(**cluster):
        with pytest.raises(ConfigError) as caught:
            load_config({**base, "cluster": cluster})
        return list(caught.value.problems)

    assert cluster_problems(workers=2, workers_per_node=2, placement="SPREAD") == [
        "cluster.workers_per_node=2: cluster.placement=SPREAD also decides how workers are "
        "spread. Only one of them is allowed. Set cluster.placement=PACK, or workers_per_node=0."
    ]
    assert cluster_problems(workers_per_node=2) == [
        "cluster.workers_per_node=2: cluster.workers=0 is a single process. Allowed with Ray "
        "workers. Set cluster.workers, or remove it."
    ]
    assert cluster_problems(
        workers=2, network_interface="eth0", network_variables={"NCCL_SOCKET_IFNAME": "eth1"}
    ) == [
        "cluster.network_variables.NCCL_SOCKET_IFNAME: cluster.network_interface=eth0 also sets "
        "it. Only one of them is allowed. Remove the other."
    ]
    assert cluster_problems(workers=2, network_variables={"LD_PRELOAD": "x"})[0].startswith(
        "cluster.network_variables.LD_PRELOAD: not a variable of nccl, gloo, UCX or libfabric. Allowed: names that start with NCCL_"
    )
    assert cluster_problems(workers=2, network_interface="eth 0") == [
        "cluster.network_interface=eth 0: not of the allowed form. Allowed: names of network "
        "interfaces, separated by commas, such as eth0. Correct it, or remove it for the default "
        "(null)."
    ]
