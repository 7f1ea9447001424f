"""Adapter folders: read back by `peft` and by dist_ft; weights that cannot be stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_tasks
import torch
from unit import small

from dist_ft.config.schema import ModelSection
from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import ADAPTER_METHODS, PROMPT_METHODS, TuningSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import CheckpointError
from dist_ft.model.adapters import adapter_files, soft_prompts, tuning
from dist_ft.model.generation import GenerationRequest, TextGenerator
from dist_ft.model.loading.load import load_task_model, model_from_config
from dist_ft.pretrained import export_info

SMALL = {"prompt": {"tokens": 3}, "adalora": {"end_step": 5}, "bottleneck": {"size": 4}}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tiny_tasks.base(tmp_path_factory.mktemp("models"))
    small.make_model().save_pretrained(folder / "llama")
    return folder


def trained(base: Path, name: str, method: str, **fields):
    """Return a tuned model whose added weights, and head, have changed."""
    task = TaskSection(name=name, labels=("a", "b", "c") if task_class(name).has_labels else ())
    section = TuningSection(method=method, **SMALL, **fields)
    folder = base / {"causal_lm": "llama", "seq2seq": "bart"}.get(name, "bert")
    model, new = load_task_model(task, ModelSection(path=str(folder), dtype="float32"))
    around = tuning.apply_tuning(model, section, 3, task)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if parameter.requires_grad or part in new:
                parameter.copy_(
                    0.3
                    * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(len(part))
                    )
                )
    return model.eval(), around, section, task, str(folder)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
@pytest.mark.parametrize(
    "name", ["causal_lm", "sequence_classification", "token_classification", "seq2seq"]
)
def test_peft_and_dist_ft_read_adapters_back(base, name, method, tmp_path):
    model, around, section, task, folder = trained(base, name, method)
    adapter_files.save_adapter(model, around, section, (folder, None), tmp_path)
    adapter_files.check_round_trip(
        model, model_from_config(model.config, task, torch.float32).eval(), section, task, tmp_path
    )
    info = {"tuning": section.model_dump(mode="json"), "base": {"path": folder, "revision": None}}
    (tmp_path / export_info.INFO_FILE).write_text(json.dumps(info))
    again, new = load_task_model(task, ModelSection(path=str(tmp_path), dtype="float32"))
    assert not new
    # Else a run that starts from the folder would train its head alone, or nothing.
    assert all(parameter.requires_grad for parameter in again.parameters())
    with torch.no_grad():
        expected, actual = (
            adapter_files.probe_outputs(found.eval(), task, soft_prompts.find_virtual_tokens(found))
            for found in (model, again)
        )
    assert torch.allclose(actual, expected, atol=1e-4)
    assert (soft_prompts.find_virtual_tokens(again) is None) == (method not in PROMPT_METHODS)


def test_changed_weights_fail_the_round_trip(base, tmp_path):
    from safetensors.torch import load_file, save_file

    model, around, section, task, folder = trained(base, "sequence_classification", "lora")
    adapter_files.save_adapter(model, around, section, (folder, None), tmp_path)
    state = load_file(tmp_path / adapter_files.WEIGHTS_FILE)
    head = next(name for name in state if name.endswith("classifier.weight"))
    save_file(state | {head: state[head] + 1}, tmp_path / adapter_files.WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="does not give the same logits"):
        adapter_files.check_round_trip(
            model,
            model_from_config(model.config, task, torch.float32).eval(),
            section,
            task,
            tmp_path,
        )


def test_trained_norms_are_saved_and_trained_adapted_matrices_are_refused(base, tmp_path):
    model, around, section, task, folder = trained(
        base, "causal_lm", "lora", trainable="*norm.weight"
    )
    adapter_files.save_adapter(model, around, section, (folder, None), tmp_path)
    adapter_files.check_round_trip(
        model, model_from_config(model.config, task, torch.float32).eval(), section, task, tmp_path
    )
    model, around, section, task, folder = trained(
        base, "causal_lm", "lora", trainable="*q_proj.weight"
    )
    with pytest.raises(
        CheckpointError,
        match=r"--adapter: .*q_proj.weight was trained too \(tuning.trainable\), and peft cannot",
    ):
        adapter_files.save_adapter(model, around, section, (folder, None), tmp_path / "other")


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_generation_uses_virtual_tokens_and_does_not_depend_on_the_batch(base, method):
    model, tokenizer = trained(base, "causal_lm", method)[0], tiny_tasks.make_tokenizer()
    decoder = TextGenerator(DecodingSection(max_new_tokens=5), tokenizer)
    rows = [GenerationRequest(np.array([5, 6])), GenerationRequest(np.array([7, 8, 9, 4, 5]))]
    together = decoder.generate_all(model, rows)
    assert together == [decoder.generate_all(model, [row])[0] for row in rows]
    assert together != decoder.generate_all(small.make_model(), rows)


def test_virtual_tokens_are_prepended_to_padded_rows(base):
    model = trained(base, "causal_lm", "prompt_tuning")[0]
    ids, mask = (
        torch.tensor([[5, 6, 0, 0], [7, 8, 9, 4]]),
        torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]),
    )
    inputs = soft_prompts.prepend_virtual_tokens(
        soft_prompts.find_virtual_tokens(model),
        {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask},
    )
    assert inputs["input_ids"].tolist() == [[-1, -2, -3, 5, 6, 0, 0], [-1, -2, -3, 7, 8, 9, 4]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
