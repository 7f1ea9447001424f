"""Plans from a config and a config.json: real architectures, trainable weights, errors."""

import json
from pathlib import Path

import pytest

from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError, ModelError
from dist_ft.runtime.preflight import model_trace, plan_report, run_plan

ROOT = Path(__file__).resolve().parents[4]
PUBLISHED = {  # parameters, as the models' cards and papers tell them
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b-v0.1": 7_241_732_096,
    "mixtral-8x7b-v0.1": 46_702_792_704,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-7b": 8_537_680_896,
    "gpt2-xl": 1_557_611_200,
    "opt-66b": 66_000_000_000,
    "phi-2": 2_779_683_840,
    "bloom-176b": 176_247_271_424,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(TINY))
    return tmp_path / "model"


def run(path, **sections):
    base = {
        "run": {"name": "x"},
        "model": {"path": str(path), "dtype": "bfloat16"},
        "data": {"train": "none.jsonl"},
        "batch": {"global_batch": 8, "micro_batch": 1, "sequence_length": 128},
        "schedule": {"steps": 1},
        "cluster": {"workers": 4, "gpus_per_worker": 1},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section}
    return load_config(base)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_parameter_counts_equal_published_numbers(name, count):
    from dist_ft.config.sections.task import TaskSection
    from dist_ft.model.loading import meta_model

    attention = "eager" if name.startswith("bloom") else "sdpa"
    model = meta_model.build_meta_model(
        run("none/none", model={"attention": attention}),
        TaskSection(),
        str(ROOT / f"configs/architectures/{name}.json"),
    )
    rounded = 0.01 if count % 10**9 == 0 else 0
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=rounded, abs=0)


def test_parameters_are_counted_without_network_access(folder):
    counted = 2 * (256 * 64) + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)
    assert model_trace.count_parameters(run(folder)) == counted
    assert model_trace.count_parameters(run("org/none"), str(folder)) == counted
    assert (
        model_trace.count_parameters(run("org/none"))
        is model_trace.count_parameters(run("s3://none/none"))
        is None
    )
    with pytest.raises(ModelError, match="--model-config=nowhere: the file does not exist"):
        model_trace.count_parameters(run(folder), "nowhere")


def test_sizes_equal_those_of_a_published_run():
    """BLOOM on 384 A100 of 80 GB: its card states 329 GB of bfloat16 weights, and 2.3 TB of a checkpoint that holds these,
    float32 masters and two moments, in units of 1024; ours leaves out the weights, which are the masters rounded."""
    found = run_plan.plan(
        run(
            "none/none",
            batch={"global_batch": 384, "sequence_length": 2048},
            cluster={"workers": 384},
            model={"activation_checkpointing": True, "attention": "eager"},
        ),
        gpu="A100-80GB",
        model_config=str(ROOT / "configs/architectures/bloom-176b.json"),
    )
    assert found["checkpoint"]["exported_model"] / 2**30 == pytest.approx(329, abs=1)
    both = found["checkpoint"]["checkpoint"] + found["checkpoint"]["exported_model"]
    assert both / 2**40 == pytest.approx(2.3, abs=0.06)
    assert found["gpus"][0]["fits"]


def test_plan_needs_only_a_config_json(folder):
    found = run_plan.plan(run(folder))
    assert found["model"]["traced"] and found["model"]["parameters"] == found["model"]["trainable"]
    rows = {row["stage"]: row for row in found["memory"]}
    psi = found["model"]["parameters"]
    assert [row["chosen"] for row in found["memory"]] == [False, False, False, True]
    assert rows[0]["gpu"]["weights"] == rows[0]["gpu"]["gradients"] == 2 * psi
    assert rows[1]["gpu"]["optimizer"] == rows[3]["gpu"]["optimizer"] == 12 * psi // 4
    assert rows[3]["sent_bytes"] == 2 * 3 * psi * 2 * 3 // 4, "two lanes, two bytes"
    assert found["checkpoint"]["checkpoint"] == 12 * psi
    json.dumps(found)


def test_only_adapter_weights_have_gradients_and_state(folder):
    whole = run_plan.plan(run(folder))
    adapted = run_plan.plan(run(folder, tuning={"method": "lora", "lora": {"rank": 4}}))
    trainable = adapted["model"]["trainable"]
    assert trainable < whole["model"]["trainable"] / 2
    assert adapted["model"]["parameters"] == whole["model"]["parameters"] + trainable
    assert adapted["memory"][0]["gpu"]["gradients"] == 2 * trainable
    assert adapted["checkpoint"]["frozen"] == 2 * whole["model"]["parameters"]


def test_regularizers_cost_a_float32_copy_each(folder):
    plain = run_plan.plan(run(folder))
    guarded = run_plan.plan(
        run(folder, tuning={"ema_decay": 0.99, "anchor": {"method": "l2", "strength": 1.0}})
    )
    psi = plain["model"]["parameters"]
    assert (
        guarded["memory"][0]["gpu"]["optimizer"] - plain["memory"][0]["gpu"]["optimizer"] == 8 * psi
    )


def test_activation_checkpointing_saves_memory(folder):
    plain, less = (
        run_plan.plan(run(folder, model={"activation_checkpointing": on}))["memory"][3]["gpu"][
            "activations"
        ]
        for on in (False, True)
    )
    assert less < plain


def test_offload_also_has_a_row_without_offload(folder):
    found = run_plan.plan(run(folder, zero={"offload_optimizer": "cpu"}))
    chosen, without = found["memory"][3], found["memory"][4]
    assert chosen["chosen"] and chosen["gpu"]["optimizer"] == 0 < chosen["host"]["optimizer"]
    assert without["offload"] == {} and without["gpu"]["optimizer"] == chosen["host"]["optimizer"]


@pytest.mark.parametrize(
    "task", [{"name": "sequence_classification", "labels": ["a", "b"]}, {"name": "masked_lm"}]
)
def test_tasks_with_a_head_are_traced(folder, task):
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "vocab_size": 256,
            }
        )
    )
    found = run_plan.plan(run(folder, task=task))
    assert found["model"]["traced"] and found["memory"][3]["gpu"]["activations"] > 0


def test_plan_for_one_gpu_type_and_number(folder):
    found = run_plan.plan(run(folder), gpu="h100", num_gpus=2)
    assert found["workers"] == 2
    assert [(gpu["name"], gpu["fits"], gpu["fewest"]) for gpu in found["gpus"]] == [
        ("H100", True, 1)
    ]


def test_large_model_needs_a_larger_cluster(folder):
    config = run(
        "none/none",
        batch={"global_batch": 64, "sequence_length": 2048},
        model={"activation_checkpointing": True},
    )
    found = run_plan.plan(
        config, model_config=str(ROOT / "configs/architectures/llama-3.1-70b.json")
    )
    gpus = {gpu["name"]: gpu for gpu in found["gpus"]}
    assert not gpus["H100"]["fits"] and gpus["H100"]["least"]["gpus"] > 8
    assert gpus["RTX4090"]["least"] is None


def test_report_has_all_sections(folder):
    text = plan_report.as_text(
        run_plan.plan(
            run(
                folder,
                cluster={"workers": "2..4", "gpus_per_worker": 1},
                checkpoint={"every_steps": 5},
            )
        )
    )
    for word in (
        "> ZeRO-3",
        "gathered weights",
        "fewest workers",
        "sent in a step",
        "checkpoint",
        "H200",
        "peak at",
        "logits",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ("remove", {}, "it has no config.json. A plan needs a model's config.json"),
        ("{", {}, "cannot read its config.json .*. It must be JSON. Download it again"),
        ("{}", {}, "has no model_type"),
        ('{"model_type": "no-such"}', {}, "cannot load the config"),
        (
            None,
            {"model_config": "/no/such.json"},
            "--model-config=/no/such.json: the file does not exist",
        ),
        (None, {"gpu": "H1000"}, "--gpu=H1000: unknown GPU"),
        (None, {"num_gpus": 9}, "--gpus=9: from 1 to the 8 lanes"),
        (None, {"num_gpus": 0}, "--gpus=0: from 1 to the 8 lanes"),
    ],
)
def test_unplannable_config_is_one_line(folder, change, given, message):
    if change == "remove":
        (folder / "config.json").unlink()
    elif change is not None:
        (folder / "config.json").write_text(change)
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        run_plan.plan(run(folder), **given)
    lines = getattr(caught.value, "problems", (str(caught.value),))
    assert len(lines) == 1 and "\n" not in lines[0]


@pytest.mark.parametrize("path", ["/no/such/folder", "./none"])
def test_missing_folder_is_reported(path):
    with pytest.raises(ModelError, match=f"model.path={path}: the folder does not exist"):
        run_plan.plan(run(path))


def test_unreachable_hub_is_reported(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no way")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(
        ModelError,
        match=r"model.path=org/name: .*does not provide its config.json.*--model-config FILE",
    ):
        run_plan.plan(run("org/name"))


def test_model_in_a_bucket_is_planned(folder):
    from dist_ft.storage import filesystem

    filesystem.Store("memory://plan-model").create("config.json", json.dumps(TINY).encode())
    found = run_plan.plan(run("memory://plan-model"))
    assert found["model"]["traced"]
    with pytest.raises(
        ModelError, match=r"model.path=memory://nothing: cannot read its config.json"
    ):
        run_plan.plan(run("memory://nothing"))
