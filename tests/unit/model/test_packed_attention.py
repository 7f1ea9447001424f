"""Attention sample by sample equals transformers' masked attention in values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unit.small import FAMILIES, VOCABULARY, batch, make_module

from dist_ft.model.causal_lm import CausalLM, batch_to_inputs
from dist_ft.model.packed_attention import ATTENTION_NAME, sample_lengths

PACKED = batch((9, 13, 5), (11, 6), seed=3)
SDPA = [family for family in FAMILIES if family != "gemma2"]


def grads(module: CausalLM, packed=PACKED) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss = module(**batch_to_inputs(packed, "cpu"))
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in module.named_parameters()},
    }


def with_masks(module: CausalLM) -> CausalLM:
    module.model.set_attn_implementation("sdpa")
    module._packed_samples = None
    return module


def test_sample_lengths_follow_positions():
    ids = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [4, 5, 0, 0, 0, 1]])
    assert sample_lengths(ids) == ((3, 2, 1), (6,), (2, 1, 1, 2))


@pytest.mark.parametrize("family", SDPA)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_those_with_masks(family, checkpointing):
    ours, plain = make_module(family), with_masks(make_module(family))
    assert (
        ours.model.config._attn_implementation == ATTENTION_NAME
        and plain.model.config._attn_implementation == "sdpa"
    )
    if checkpointing:
        ours.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        ours.train()
    actual, expected = grads(ours), grads(plain)
    for name in expected:
        assert torch.allclose(actual[name], expected[name], rtol=1e-4, atol=1e-5), name


def test_no_mask_is_created(monkeypatch):
    from transformers import masking_utils

    module = make_module()
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda **_: pytest.fail("a mask"))
    grads(module)


def test_window_shorter_than_a_sample_uses_the_mask():
    narrow = make_module("mistral", sliding_window=4)
    assert torch.allclose(
        grads(narrow)["loss"],
        grads(with_masks(make_module("mistral", sliding_window=4)))["loss"],
        rtol=1e-5,
    )
    assert not torch.allclose(
        grads(narrow)["loss"], grads(make_module("mistral"))["loss"], rtol=1e-5
    )


def test_other_forwards_use_the_models_own_attention():
    module, fresh = make_module().eval(), with_masks(make_module()).eval()
    grads(module)
    ids = torch.arange(18).reshape(1, 18) % VOCABULARY
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    with torch.no_grad():
        for inputs in (
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": mask},
            {"input_ids": torch.from_numpy(PACKED.input_ids)},
        ):
            assert torch.allclose(
                module.model(**inputs).logits[:, 3:], fresh.model(**inputs).logits[:, 3:], atol=1e-5
            )
        generated = module.model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, fresh.model.generate(ids, max_new_tokens=4, do_sample=False))


def test_attention_name_is_not_saved(tmp_path):
    module = make_module()
    module.model.config.save_pretrained(tmp_path)
    assert ATTENTION_NAME not in (tmp_path / "config.json").read_text()


def test_eager_attention_is_not_replaced():
    assert make_module("llama", "eager").model.config._attn_implementation == "eager"
