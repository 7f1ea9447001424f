"""Each tuning method under each engine: one answer, exact resume, and its export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny
import torch

from dist_ft import api
from dist_ft.checkpoint import discovery
from dist_ft.config.load import load_config
from dist_ft.config.sections.tuning import ADAPTER_METHODS, MERGEABLE_METHODS
from dist_ft.core.errors import CheckpointError, ConfigError
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

METHODS: dict[str, dict[str, Any]] = {
    "partial": {"method": "partial", "last_layers": 1},
    "head": {"method": "partial", "trainable": "lm_head.*"},
    "lora": {"method": "lora", "lora": {"rank": 4, "dropout": 0.1}},
    "dora": {
        "method": "lora",
        "lora": {"rank": 2, "dora": True, "targets": ["c_attn"]},
        "trainable": "*ln_f*",
    },
    "ia3": {"method": "ia3"},
    "prompt": {"method": "prompt_tuning", "prompt": {"tokens": 4}},
    "p-tuning": {"method": "p_tuning", "prompt": {"tokens": 4, "hidden_size": 16}},
    "prefix": {"method": "prefix_tuning", "prompt": {"tokens": 4}},
    "adalora": {
        "method": "adalora",
        "adalora": {
            "initial_rank": 4,
            "rank": 2,
            "begin_step": 3,
            "end_step": 14,
            "every_steps": 4,
            "dropout": 0.1,
        },
    },
    "bottleneck": {
        "method": "bottleneck",
        "bottleneck": {"size": 8, "dropout": 0.1},
        "trainable": "*ln_f*",
    },
    "gradual": {"method": "full", "layer_decay": 0.7, "unfreeze_steps": 4},
    "noisy": {"method": "full", "frozen": "*wpe*", "label_smoothing": 0.1, "neftune_alpha": 5},
}


RATES = {"ia3": 0.1, "prompt": 0.05, "prefix": 0.05}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""DeepSpeed keeps small weights whole on each worker under ZeRO-3; here they all are small."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("methods"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name == "lora" else pytest.mark.slow) for name in METHODS
    ],
)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(base: Path, method: str) -> list[float]:
    """The losses of the plain engine, which fall."""
    document = document_of(base, method, "plain")
    local.run(load_config(document))
    losses = history.losses(base / f"runs/{method}-plain")
    before = losses[:5]
    if method in (
        "prompt",
        "p-tuning",
    ):  # before a model that knows nothing they do little, so: than without learning
        still = document_of(base, method, "still")
        still["optimizer"]["learning_rate"] = 1e-9
        local.run(load_config(still))
        before = history.losses(base / f"runs/{method}-still")[-5:]
    assert sum(losses[-5:]) < sum(before) - 0.01
    return losses


def document_of(base: Path, method: str, name: str, **fields: Any) -> dict[str, Any]:
    rate = {"learning_rate": RATES.get(method, 5e-3)}
    packed = {"pack": method != "prefix"}
    return tiny.config(
        base, f"{method}-{name}", tuning=METHODS[method], optimizer=rate, data=packed, **fields
    )


def stages_of(method: str) -> tuple[int, ...]:
    """Return the ZeRO stages a method is allowed under."""
    return (0,) if method == "adalora" else (0, 2, 3)


def test_promise_7_every_engine_matches_the_plain_losses(
    base: Path, method: str, plain: list[float]
) -> None:
    documents = [
        document_of(base, method, f"z{stage}", workers=2, stage=stage)
        for stage in stages_of(method)
    ]
    if method not in ("adalora", "prefix"):
        documents.append(document_of(base, method, "z3-recomputed", workers=2, stage=3))
        documents[-1]["model"]["activation_checkpointing"] = True
    for document in documents:
        document["zero"]["deepspeed"] = SHARDED if document["zero"]["stage"] == 3 else {}
    folder = base / f"ranks-{method}"
    ranks.require_ok(ranks.run_ranks(2, documents, folder), folder)
    for document in documents:
        run = base / "runs" / document["run"]["name"]
        assert history.losses(run) == pytest.approx(plain, abs=1e-5), document["run"]["name"]
        history.require_exactly_once(run, document)
        store = Store(str(run))
        assert len(store.list(discovery.FROZEN)) == (
            method != "gradual"
        )  # in the first checkpoint, never again


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_promise_2_a_killed_run_resumes_bit_exact(
    base: Path, method: str, plain: list[float], stage: int
) -> None:
    if stage not in stages_of(method) or (stage == 0) != (method == "adalora"):
        pytest.skip("adalora: stage 0; all others: 2 and 3")
    unbroken = base / f"runs/{method}-z{stage}"
    if not unbroken.exists():
        pytest.skip("needs the runs of the test above; run the module whole")
    document, folder = (
        document_of(base, method, f"killed-{stage}", workers=2, stage=stage),
        base / f"k-{method}-{stage}",
    )
    document["zero"]["deepspeed"] = SHARDED if stage == 3 else {}
    assert ranks.run_ranks(2, [document], folder, env={"DIST_FT_FAILPOINT": "train.step:11"}) == [
        -9,
        -9,
    ]
    ranks.require_ok(ranks.run_ranks(2, [document], folder), folder)
    run = base / "runs" / document["run"]["name"]
    assert history.losses(run) == history.losses(unbroken)
    assert Store(str(run)).list(discovery.FROZEN) == ["step-000000004-a0001"] * (
        method != "gradual"
    )


def test_the_export_is_a_plain_model(
    base: Path, method: str, plain: list[float], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = str(base / f"runs/{method}-plain")
    if METHODS[method]["method"] in {*ADAPTER_METHODS} - {*MERGEABLE_METHODS}:
        with pytest.raises(
            CheckpointError, match=r"cannot be merged into the model's weights\. .*--adapter"
        ):
            api.export(run, str(tmp_path / "out"))
        return
    api.export(run, str(tmp_path / "out"))
    before = AutoModelForCausalLM.from_pretrained(base / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linear = {
        name for name in before if ".h." in name and name.endswith("weight") and "ln_" not in name
    }
    assert (
        changed
        == {
            "partial": {
                name
                for name in before
                if name.startswith(("transformer.h.1.", "transformer.ln_f."))
            },
            "head": {"transformer.wte.weight", "lm_head.weight"},
            "lora": linear,
            "adalora": changed & linear,
            "dora": {name for name in before if name.endswith("c_attn.weight") or "ln_f" in name},
            "noisy": before.keys() - {"transformer.wpe.weight"},
            "gradual": set(before),
            "ia3": changed,
        }[method]
        and changed
    )


def test_peft_and_generate_load_an_exported_adapter(
    base: Path, method: str, plain: list[float], tmp_path: Path
) -> None:
    """`export` itself has compared what peft reads."""
    run, out = str(base / f"runs/{method}-plain"), str(tmp_path / "adapter")
    if METHODS[method]["method"] not in ADAPTER_METHODS:
        with pytest.raises(CheckpointError, match="--adapter: the run "):
            api.export(run, out, adapter=True)
        return
    api.export(run, out, adapter=True)
    assert json.loads((tmp_path / "adapter/dist_ft.json").read_text())["base"]["path"] == str(
        base / "model"
    )
    answer = api.generate(out, "say the quick brown fox", max_new_tokens=8)
    if METHODS[method]["method"] in MERGEABLE_METHODS:
        api.export(run, str(tmp_path / "merged"))
        assert answer == api.generate(
            str(tmp_path / "merged"), "say the quick brown fox", max_new_tokens=8
        )


def test_a_run_does_not_resume_with_another_method(
    base: Path, method: str, plain: list[float]
) -> None:
    document = document_of(base, method, "plain")
    document["tuning"] = {"method": "lora", "lora": {"rank": 3}}
    with pytest.raises(ConfigError, match=r"tuning\."):
        local.run(load_config(document))
