"""Fault 30: experts without tokens on a rank, and layers that ranks drop, under every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import history
import numpy as np
import pytest
import ranks
import tiny_tasks

from dist_ft.config.load import load_config
from dist_ft.runtime import local

SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
TIMEOUT_S = 120


def make_switch(folder: Path) -> None:
    """Write a tiny model with eight experts of their own in every second layer."""
    import torch
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    tokenizer = tiny_tasks.make_tokenizer()
    torch.manual_seed(0)
    SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_sparse_encoder_layers=1,
            num_decoder_layers=2,
            num_sparse_decoder_layers=1,
            num_heads=2,
            num_experts=8,
            expert_capacity=64,
            router_jitter_noise=0.0,
            dropout_rate=0.1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_layer_drop(folder: Path) -> None:
    """Write a tiny model that drops half of its layers in training."""
    import torch
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    tokenizer = tiny_tasks.make_tokenizer()
    torch.manual_seed(0)
    M2M100ForConditionalGeneration(
        M2M100Config(
            vocab_size=len(tokenizer),
            d_model=32,
            encoder_layers=3,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            encoder_layerdrop=0.5,
            decoder_layerdrop=0.5,
            dropout=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.cls_token_id,
            eos_token_id=tokenizer.sep_token_id,
            decoder_start_token_id=tokenizer.sep_token_id,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS = {"experts": make_switch, "layer-drop": make_layer_drop}


@pytest.fixture(scope="module", params=MODELS)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, next to the model."""
    base = tmp_path_factory.mktemp("uneven")
    MODELS[request.param](base / "model")
    local.run(load_config(document(base, "plain")))
    return base


def document(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    config = tiny_tasks.config(
        base, "seq2seq", name, schedule={"epochs": None, "steps": 6}, **changes
    )
    config["model"].update(path=str(base / "model"), attention="eager")
    # micro-batches of one short row: most experts get no token of it
    config["batch"] = {"global_batch": 4, "micro_batch": 1, "sequence_length": 40}
    config["evaluation"] = {}
    return config


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_fault_30_uneven_modules_hang_no_stage(plain: Path, stage: int) -> None:
    zero = {"stage": stage, "deepspeed": SHARDED if stage == 3 else {}}
    config = document(plain, f"zero-{stage}", workers=2, stage=stage)
    config["zero"] = {**config.get("zero", {}), **zero}
    folder = plain / f"ranks-{stage}"
    ranks.require_ok(ranks.run_ranks(2, [config], folder, timeout_s=TIMEOUT_S), folder)

    expected = history.losses(plain / "runs/seq2seq-plain")
    found = history.losses(plain / f"runs/seq2seq-zero-{stage}")
    assert len(expected) == 6
    assert np.allclose(found, expected, rtol=0, atol=1e-5)
