"""Which weights are trained and added, and that adapters can be merged."""

from __future__ import annotations

import re

import pytest
import torch
from unit.small import FAMILIES, make_model

from dist_ft.config.sections.tuning import MERGEABLE_METHODS, LoraSection, TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.model.adapters import added_layers, tuning


def tuned(family: str = "llama", model=None, seed: int = 5, **fields):
    model = model if model is not None else make_model(family)
    tuning.apply_tuning(model, TuningSection(**fields), seed)
    return model


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def test_full_trains_all_weights():
    model = tuned(method="full")
    assert trainable(model) == names(model)


def test_full_with_frozen_embeddings():
    model = tuned(method="full", frozen="model.embed_tokens.*")
    assert names(model) - trainable(model) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layers_include_final_norm_and_output_layer(family):
    model = tuned(family, method="partial", last_layers=1)
    prefix, after = (
        ("transformer.h", "transformer.ln_f.")
        if family == "gpt2"
        else ("model.layers", "model.norm.")
    )
    own_head = {"lm_head.weight"} & names(model)
    assert {
        name for name in trainable(model) if not name.startswith((f"{prefix}.1.", after))
    } == own_head
    assert any(name.startswith(after) for name in trainable(model))
    assert all(name in trainable(model) for name in names(model) if name.startswith(f"{prefix}.1."))


def test_tied_output_layer_stays_frozen():
    model = tuned(model=make_model(tie_word_embeddings=True), method="partial", last_layers=1)
    assert "model.embed_tokens.weight" in names(model) - trainable(model)


def test_tied_output_layer_by_name_is_trained_in_both_places(caplog):
    with caplog.at_level("INFO", "dist_ft"):
        model = tuned(
            model=make_model(tie_word_embeddings=True), method="partial", trainable="lm_head.*"
        )
    assert trainable(model) == {"model.embed_tokens.weight"}
    assert "lm_head.weight is tied to model.embed_tokens.weight" in caplog.text


def test_untied_output_layer_is_trained_alone():
    model = tuned(
        model=make_model(tie_word_embeddings=False), method="partial", trainable="lm_head.*"
    )
    assert trainable(model) == {"lm_head.weight"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [{}, {"rslora": True, "alpha": 4}, {"dora": True}])
def test_lora_starts_unchanged_and_is_trained_alone(family, lora):
    model, tokens = make_model(family), torch.arange(24)[None] % 97
    with torch.no_grad():
        before = model(tokens).logits
    tuned(model=model, method="lora", lora=LoraSection(rank=4, **lora))
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, before, atol=1e-5)
    assert trainable(model) and all(added_layers.is_added(name) for name in trainable(model))
    assert not any("lm_head" in name for name in trainable(model))
    own = {
        tuning.name_in_model_files(name) for name in names(model) if not added_layers.is_added(name)
    }
    assert own == names(make_model(family))


def test_lora_on_named_layers_with_trainable_norms():
    model = tuned(method="lora", lora=LoraSection(targets="v_proj"), trainable="*norm.weight")
    assert {name.split(".")[3] if "layers" in name else name for name in trainable(model)} == {
        "self_attn",
        "input_layernorm",
        "post_attention_layernorm",
        "model.norm.weight",
    }
    assert all("v_proj.lora_" in name for name in trainable(model) if "self_attn" in name)


def test_added_weights_follow_from_the_seed_alone():
    torch.manual_seed(0)
    first, state = dict(tuned(method="lora").named_parameters()), torch.get_rng_state()
    torch.manual_seed(0)
    make_model()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    again = dict(tuned(model=make_model(), method="lora").named_parameters())
    other = dict(tuned(method="lora", seed=6).named_parameters())
    (name, *_) = [name for name in first if "lora_A" in name]
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


@pytest.mark.parametrize("method", MERGEABLE_METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_model_gives_the_same_logits_under_its_own_names(method, family):
    model, tokens = (
        tuned(family, method=method, adalora={"end_step": 9}),
        torch.arange(24)[None] % 97,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if added_layers.is_added(name):
                parameter += 0.3 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(1)
                )
        expected = model.eval()(tokens).logits
        tuning.merge_adapters(model)
        assert torch.allclose(model(tokens).logits, expected, atol=1e-4)
    assert names(model) == names(make_model(family))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"method": "partial", "last_layers": 3},
            "tuning.last_layers=3: the model has 2 layers. Use at most 2.",
        ),
        (
            {"method": "partial", "trainable": "lmhead.*"},
            "tuning.trainable=lmhead.*: no weight matches this pattern. The model has model",
        ),
        ({"method": "full", "frozen": "*"}, "tuning: no weight is trainable"),
        (
            {"method": "lora", "lora": {"targets": ["q_prj"]}},
            "tuning.lora.targets=['q_prj']: peft cannot add adapters",
        ),
        (
            {"method": "lora", "lora": {"targets": ["q_proj", "v_prj"]}},
            "tuning.lora.targets=['q_proj', 'v_prj']: no layer is named v_prj. The model has "
            "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj. Correct the "
            "name.",
        ),
    ],
)
def test_unmatched_options_raise_an_error_of_one_line(fields, message):
    with pytest.raises(ModelError, match=re.escape(message)) as found:
        tuned(**fields)
    assert "\n" not in str(found.value)


def test_adapter_on_a_tied_output_layer_is_refused():
    """Merged, it would change the input embeddings too."""
    with pytest.raises(
        ModelError,
        match=re.escape("tuning.lora: lm_head.weight is tied to model.embed_tokens.weight"),
    ):
        tuned(
            model=make_model(tie_word_embeddings=True),
            method="lora",
            lora=LoraSection(targets=("v_proj", "lm_head")),
        )
    assert trainable(
        tuned(
            model=make_model(tie_word_embeddings=False),
            method="lora",
            lora=LoraSection(targets="lm_head"),
        )
    )


def test_final_norm_may_be_created_before_the_layers():
    from transformers import OPTConfig, OPTForCausalLM

    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=3,
            word_embed_proj_dim=32,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    found = trainable(tuned(model=model, method="partial", last_layers=1))
    assert {name for name in found if ".layers.2." not in name} == {
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    }


def test_own_weights_named_like_adapters_stay_frozen():
    model = make_model()
    model.model.lora_scale = torch.nn.Parameter(torch.ones(3))
    assert "model.lora_scale" not in trainable(tuned(model=model, method="partial", last_layers=1))
