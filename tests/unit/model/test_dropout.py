"""`model.dropout` sets every dropout of a model, whatever its family calls it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from unit.model.loading.test_load import refused, section
from unit.small import make_model

from dist_ft.model.loading.load import load_causal_lm, read_config


def dropouts(model) -> set[float]:
    """Return the probability of every dropout in a model, modules and attention's own."""
    modules = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    own = {
        getattr(m, name, None) for m in model.modules() for name in ("attention_dropout", "dropout")
    }
    return modules | {value for value in own if isinstance(value, int | float)}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("qwen2", {}),
        (
            "opt",
            {
                "num_hidden_layers": 1,
                "hidden_size": 16,
                "ffn_dim": 16,
                "num_attention_heads": 2,
                "word_embed_proj_dim": 16,
            },
        ),
        ("bloom", {"n_layer": 1, "hidden_size": 16, "n_head": 2}),
        (
            "gpt_neox",
            {
                "num_hidden_layers": 1,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "intermediate_size": 16,
            },
        ),
    ],
)
def test_model_dropout_sets_every_dropout(tmp_path, family, changes):
    if changes:
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, vocab_size=97, **changes)
        ).save_pretrained(tmp_path)
    else:
        make_model(family).save_pretrained(tmp_path)
    kernel = {"attention": "eager"} if family == "bloom" else {}
    for probability in (0.0, 0.25):
        assert dropouts(
            load_causal_lm(section(tmp_path, dropout=probability, **kernel)).train()
        ) == {probability}


def test_model_dropout_sets_nested_configs(tmp_path):
    config = AutoConfig.for_model("mpt", n_layers=1)
    config.attn_config.attn_pdrop = 1
    config.save_pretrained(tmp_path)
    config = read_config(section(tmp_path, dropout=0.0))
    assert (config.resid_pdrop, config.emb_pdrop, config.attn_config.attn_pdrop) == (0, 0, 0)
    assert refused(read_config, tmp_path, dropout=0.5).startswith(
        f"model.path={tmp_path}: cannot load the config with model.dropout=0.5 ("
    )
