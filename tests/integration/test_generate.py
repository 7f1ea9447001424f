"""Generations at evaluations equal those of plain transformers row by row, in every engine and world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny
import tiny_tasks

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

LENGTH = 10
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.5},
    "beam": {"strategy": "beam", "num_beams": 3, "length_penalty": 0.4},
    "choices": {
        "choices": ["bread", "every child", "seven wise owls watch rivers", "seven wise stones"]
    },
    "sample": {
        "strategy": "sample",
        "temperature": 0.8,
        "top_p": 0.95,
        "num_samples": 2,
        "seed": 3,
    },
}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SAMPLES = 13


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tasks.base(tiny.base(tmp_path_factory.mktemp("generate"), samples=20))
    tiny.make_data(folder / "held-out" / "causal_lm", 23, seed=1)
    for kind, name in (("AutoModelForCausalLM", "model"), ("AutoModelForSeq2SeqLM", "bart")):
        enliven(kind, folder / name)
    return folder


def enliven(kind: str, folder: Path) -> None:
    """Make weights large enough that texts differ by their prompts and do not end at once."""
    import torch
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    model.save_pretrained(folder)


def document_of(base: Path, task: str, strategy: str, name: str, **fields: Any) -> dict[str, Any]:
    """Return a run of one step, evaluated before and after."""
    held_out = {"data": f"{base}/held-out/causal_lm/*.jsonl"} if task == "causal_lm" else {}
    evaluation = {
        **held_out,
        "generate_samples": SAMPLES,
        "keep_generations": 99,
        "text_metrics": ["bleu", "chrf", "token_error_rate"],
        "decoding": {"max_new_tokens": LENGTH, "batch_size": 4, **STRATEGIES[strategy]},
    }
    if task == "causal_lm":
        document = tiny.config(
            base,
            "x",
            schedule={"steps": 1, "epochs": None, "warmup_steps": 0},
            evaluation=evaluation,
            **fields,
        )
    else:
        document = tiny_tasks.config(
            base, task, "x", schedule={"steps": 1, "epochs": None, "warmup_steps": 0}, **fields
        )
        document["evaluation"].update(evaluation)
    document["run"]["name"] = f"{task.replace('_', '-')}-{strategy}-{name}"
    if fields.get("stage") == 3:
        document["zero"]["deepspeed"] = SHARDED
    return document


def evaluation(base: Path, document: dict[str, Any], step: int = 0) -> dict[str, Any]:
    store = Store(str(base / "runs" / document["run"]["name"]))
    return json.loads(store.read(f"evaluations/step-{step:09d}.json"))


def by_plain_transformers(
    base: Path, task: str, strategy: str, model: Path | None = None
) -> list[str]:
    """Return the texts transformers alone makes of the first held-out rows, one by one."""
    import transformers

    kind = "AutoModelForCausalLM" if task == "causal_lm" else "AutoModelForSeq2SeqLM"
    model = model or base / ("model" if task == "causal_lm" else "bart")
    network = getattr(transformers, kind).from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if task == "causal_lm":
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            for row in held_out(base, task)
        ]
    else:
        prompts = [
            tokenizer(row["source"], return_tensors="pt")["input_ids"]
            for row in held_out(base, task)
        ]
    given = {
        name: value
        for name, value in STRATEGIES[strategy].items()
        if name not in ("strategy", "num_samples")
    }
    texts = []
    for prompt in prompts[:SAMPLES]:
        made = network.generate(
            prompt, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, **given
        )
        texts.append(
            tokenizer.decode(
                made[0, 1 if task == "seq2seq" else prompt.shape[1] :], skip_special_tokens=True
            ).strip()
        )
    return texts


def held_out(base: Path, task: str) -> list[dict[str, Any]]:
    files = sorted((base / "held-out" / task).glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_every_engine_generates_the_same_as_plain_transformers(base: Path, task: str) -> None:
    documents = {}
    for strategy in STRATEGIES:
        documents[strategy, 0] = document_of(base, task, strategy, "plain")
        local.run(load_config(documents[strategy, 0]))
        for stage in (2, 3):
            documents[strategy, stage] = document_of(
                base, task, strategy, f"z{stage}", workers=2, stage=stage
            )
    folder = base / f"ranks-{task}"
    ranks.require_ok(
        ranks.run_ranks(
            2, [document for (_, stage), document in documents.items() if stage], folder
        ),
        folder,
    )
    for strategy in STRATEGIES:
        plain = evaluation(base, documents[strategy, 0])
        assert len(plain["generations"]) == SAMPLES
        references = [
            row["response" if task == "causal_lm" else "target"] for row in held_out(base, task)
        ]
        assert [one["reference"] for one in plain["generations"]] == references[:SAMPLES]
        if strategy in ("greedy", "penalised", "beam"):
            assert [one["text"] for one in plain["generations"]] == by_plain_transformers(
                base, task, strategy
            ), strategy
        elif strategy == "choices":
            assert {one["text"] for one in plain["generations"]} <= set(
                STRATEGIES["choices"]["choices"]
            )
        assert len({one["text"] for one in plain["generations"]}) > 1
        for stage in (2, 3):
            found = evaluation(base, documents[strategy, stage])
            assert found["generations"] == plain["generations"], (strategy, stage)
            assert {name: found[name] for name in ("bleu", "chrf", "token_error_rate")} == {
                name: plain[name] for name in ("bleu", "chrf", "token_error_rate")
            }
            after = [
                evaluation(base, documents[strategy, kind], 1)["generations"] for kind in (0, stage)
            ]
            assert sum(a == b for a, b in zip(*after, strict=True)) >= SAMPLES - 1, (
                "training went on the same"
            )


def test_an_adapter_generates_text(base: Path, tmp_path: Path) -> None:
    """After training, the folder with the merged adapter generates the same."""
    document = document_of(
        base,
        "causal_lm",
        "greedy",
        "lora",
        tuning={"method": "lora", "lora": {"rank": 4}},
        optimizer={"learning_rate": 0.1},
    )
    local.run(load_config(document))
    api.export(load_config(document), str(tmp_path / "out"))
    before, after = (evaluation(base, document, step)["generations"] for step in (0, 1))
    assert [one["text"] for one in after] == by_plain_transformers(
        base, "causal_lm", "greedy", tmp_path / "out"
    )
    assert before != after
