"""Virtual tokens: the outputs of `peft`, before each sample of a packed row, for every task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_tasks
import torch
from unit import small

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import PROMPT_METHODS, TuningSection
from dist_ft.config.task_facts import task_class
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.model import heads
from dist_ft.model.adapters import added_layers, soft_prompts, tuning
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.task_models import SpecialTokens, TaskModel

TASKS = (
    "sequence_classification",
    "token_classification",
    "question_answering",
    "embedding",
    "seq2seq",
)


def tuned(
    model, method: str, task: TaskSection = tuning.CAUSAL_LM, seed: int = 5, text_ids=(), **prompt
):
    tuning.apply_tuning(
        model, TuningSection(method=method, prompt={"tokens": 3, **prompt}), seed, task, text_ids
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if added_layers.is_added(name):
                parameter.add_(
                    0.3
                    * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(len(name))
                    )
                )
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_tasks.base(tmp_path_factory.mktemp("models"))


def load_base(base: Path, task: TaskSection):
    folder = base / ("bart" if task.name == "seq2seq" else "bert")
    torch.manual_seed(1)
    labels = {"num_labels": 3} if task_class(task.name).has_labels else {}
    return heads.auto_class(task).from_pretrained(folder, **labels).eval()


def peft_twin(model, untouched):
    """Return peft's own model around `untouched`, with the virtual tokens of `model`."""
    from peft import get_peft_model

    virtual = soft_prompts.find_virtual_tokens(model)
    twin = get_peft_model(untouched, virtual.config)
    twin.prompt_encoder["default"].load_state_dict(virtual.encoder.state_dict())
    return twin.eval()


@pytest.mark.parametrize("method", PROMPT_METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_causal_logits_equal_peft(family, method):
    model = tuned(small.make_model(family), method)
    twin = peft_twin(model, small.make_model(family))
    tokens = torch.arange(3, 20)[None]
    virtual = soft_prompts.find_virtual_tokens(model)
    ids, mask = virtual.prepend(tokens, torch.ones_like(tokens))
    with torch.no_grad():
        own = model.eval()(ids, attention_mask=mask).logits
        assert torch.allclose(
            own, twin(tokens, attention_mask=torch.ones_like(tokens)).logits, atol=1e-5
        )
    assert own.shape[1] == 17 + len(virtual.ids) == (17 if method == "prefix_tuning" else 20)


@pytest.mark.parametrize("method", PROMPT_METHODS)
@pytest.mark.parametrize("name", TASKS)
def test_task_outputs_of_padded_rows_equal_peft(base, name, method):
    task = TaskSection(name=name)
    model, untouched = tuned(load_base(base, task), method, task), load_base(base, task)
    untouched.load_state_dict(model.state_dict(), strict=False)
    module, twin = TaskModel(model, task, SpecialTokens(0)).eval(), peft_twin(model, untouched)
    ids = torch.tensor([[2, 9, 8, 7, 3], [2, 5, 3, 0, 0]])
    mask = (ids != 0).long()
    with torch.no_grad():
        if name == "seq2seq":
            given = {
                "input_ids": ids,
                "attention_mask": mask,
                "decoder_input_ids": ids,
                "decoder_attention_mask": mask,
            }
            expected, shift = twin(**given).logits, 0
            before = module.virtual.prepend(ids, mask)
            actual = model(**given | {"input_ids": before[0], "attention_mask": before[1]}).logits
        else:
            output, shift = twin(input_ids=ids, attention_mask=mask), len(module.virtual.ids)
            expected = (
                output[0]
                if name == "embedding"
                else output.logits
                if "logits" in output
                else output.start_logits
            )
            run = module.run_model(ids, mask)
            actual = (
                run.last_hidden_state
                if name == "embedding"
                else run.logits
                if "logits" in run
                else run.start_logits
            )
            if name != "sequence_classification":
                actual, expected = module.drop_virtual_tokens(actual), expected[:, shift:]
                assert actual.shape[:2] == ids.shape
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_have_the_prompt_each_and_stay_separate(method, attention):
    module = CausalLM(tuned(small.make_model(attention=attention), method)).eval()
    packed = small.batch((7, 5, 4), (9, 7))
    with torch.no_grad():
        whole = module(**module.prepare_inputs(packed, "cpu"))
        alone = sum(
            module(**module.prepare_inputs(one, "cpu")) for one in small.split_into_samples(packed)
        )
        plain = small.make_module(attention=attention).eval()
        assert whole.item() == pytest.approx(alone.item(), rel=1e-5)
        assert abs(whole.item() - plain(**plain.prepare_inputs(packed, "cpu")).item()) > 1


def test_virtual_tokens_precede_samples_with_targets_only():
    packed = small.batch((3, 2), (4,), target_share=1.0)
    batch = soft_prompts.insert_virtual_tokens(packed, range(-1, -3, -1))
    first, second = packed.input_ids[0], packed.input_ids[1]
    assert batch.input_ids.tolist() == [
        [-1, -2, *first[:3], -1, -2, *first[3:5]],
        [-1, -2, *second[:4], *batch.input_ids[1, 6:]],
    ]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert batch.position_ids[1].tolist()[:7] == [0, 1, 2, 3, 4, 5, 0]
    assert batch.num_target_tokens == packed.num_target_tokens
    assert (batch.target_ids[batch.input_ids < 0] == IGNORE_INDEX).all()
    order = batch.target_ids[batch.target_ids != IGNORE_INDEX]
    assert order.tolist() == packed.target_ids[packed.target_ids != IGNORE_INDEX].tolist()


def test_empty_batch_gives_every_weight_a_zero_gradient():
    """ZeRO waits for the gradient of every weight, on every rank."""
    from dist_ft.data.batch import empty_batch

    module = CausalLM(tuned(small.make_model(), "p_tuning"))
    module(**module.prepare_inputs(empty_batch(), "cpu")).backward()
    assert all(
        p.grad is not None and not p.grad.any() for p in module.parameters() if p.requires_grad
    )


def test_prompt_starts_from_embeddings_or_a_text():
    model = small.make_model()
    words = model.get_input_embeddings().weight.detach()
    section = {"method": "prompt_tuning", "prompt": {"tokens": 5, "init": "text", "text": "x"}}
    tuning.apply_tuning(model, TuningSection(**section), 1, text_ids=[7, 9])
    assert torch.equal(
        soft_prompts.find_virtual_tokens(model).encoder.embedding.weight, words[[7, 9, 7, 9, 7]]
    )
    drawn = [
        soft_prompts.find_virtual_tokens(tuned_bare(seed)).encoder.embedding.weight.detach()
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert all((words == row).all(1).any() for row in drawn[0])
    random = soft_prompts.find_virtual_tokens(tuned_bare(1, init="random")).encoder.embedding.weight
    assert 0.01 < random.std() < 0.03


def tuned_bare(seed: int, **prompt):
    model = small.make_model()
    tuning.apply_tuning(
        model, TuningSection(method="prompt_tuning", prompt={"tokens": 5, **prompt}), seed
    )
    return model


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_generate_equals_repeated_forwards(method):
    model = tuned(small.make_model(), method).eval()
    virtual = soft_prompts.find_virtual_tokens(model)
    tokens = torch.tensor([[5, 6, 7, 8]])
    ids, mask = virtual.prepend(tokens, torch.ones_like(tokens))
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    with torch.no_grad():
        for _ in range(6):
            best = (
                model(ids, attention_mask=torch.ones_like(ids))
                .logits[:, -1]
                .argmax(-1, keepdim=True)
            )
            ids = torch.cat([ids, best], 1)
    assert generated.tolist() == ids.tolist()


def test_noise_covers_virtual_tokens():
    module = CausalLM(tuned(small.make_model(), "prompt_tuning"), neftune_alpha=5)
    packed = small.batch((7, 5), (9,))
    loss = module(**module.prepare_inputs(packed, "cpu"))
    assert (
        np.isfinite(loss.item())
        and loss.item() != module.eval()(**module.prepare_inputs(packed, "cpu")).item()
    )
