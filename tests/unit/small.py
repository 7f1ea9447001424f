"""Small real models of several families and batches, for tests of model, engine, checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dist_ft.checkpoint.ledger import LedgerRows
from dist_ft.checkpoint.manifest import Progress, TensorInfo
from dist_ft.checkpoint.save_status import SaveRequest
from dist_ft.config.schema import CheckpointSection, OptimizerSection, RunConfig
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.data.batching.assemble import assemble_batch
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.trainable_model import parameters_by_name

VOCABULARY = 97
_WIDE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "mistral": {**_WIDE, "sliding_window": 64},
    "qwen2": _WIDE,
    "gemma2": {
        **_WIDE,
        "sliding_window": 64,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def kernels(family: str) -> list[str]:
    """Return the attention kernels that run here for a family.

    Transformers has no SDPA for Gemma 2.
    """
    return ["eager"] if family == "gemma2" else ["sdpa", "eager"]


def make_model(
    family: str = "llama", attention: str | None = None, dropout: float = 0.0, **changes: Any
) -> Any:
    """Return a transformers model: two layers, width 32, weights large enough for attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **{**FAMILIES[family], **changes},
    )
    for name in [name for name in vars(config) if name.endswith(("dropout", "_pdrop"))]:
        setattr(config, name, dropout)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention or kernels(family)[0], dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def make_module(
    family: str = "llama", attention: str | None = None, dropout: float = 0.0, **changes: Any
) -> CausalLM:
    """Return the same model in the module that the engines train."""
    return CausalLM(make_model(family, attention, dropout, **changes))


def batch(
    *rows: tuple[int, ...], seed: int = 0, target_share: float = 0.7, lane: int = 0, epoch: int = 0
) -> Batch:
    """Return a batch of rows of samples of the given lengths; `target_share` are targets."""
    rng = np.random.default_rng(seed)
    lengths = [length for row in rows for length in row]
    segments = np.array(
        [[seed * 1000 + i, 0, length, epoch] for i, length in enumerate(lengths)], dtype=np.int64
    )
    tokens = rng.integers(3, VOCABULARY, sum(lengths))
    return assemble_batch(
        tokens,
        (rng.random(len(tokens)) < target_share).astype(np.int64),
        segments,
        np.repeat(np.arange(len(rows)), [len(row) for row in rows]),
        lane,
    )


def split_into_samples(packed: Batch) -> list[Batch]:
    """Return each sample of a packed batch as a batch of its own."""
    found, place = [], 0
    width = packed.input_ids.shape[1]
    starts = np.flatnonzero((packed.position_ids == 0).reshape(-1))
    for piece in packed.segments:
        start = next(s for s in starts if s >= place)
        row, column = divmod(int(start), width)
        part = np.s_[row : row + 1, column : column + int(piece[2])]
        found.append(
            Batch(
                packed.input_ids[part],
                packed.target_ids[part],
                packed.position_ids[part],
                piece[None],
                0,
            )
        )
        place = start + int(piece[2])
    return found


def only_targets(packed: Batch, sample: int) -> Batch:
    """Return `packed` with the targets of one sample only."""
    targets, place = np.full_like(packed.target_ids, IGNORE_INDEX).reshape(-1), 0
    starts = np.flatnonzero((packed.position_ids == 0).reshape(-1))
    for index, piece in enumerate(packed.segments):
        start = int(next(s for s in starts if s >= place))
        place = start + int(piece[2])
        if index == sample:
            targets[start:place] = packed.target_ids.reshape(-1)[start:place]
    return Batch(
        packed.input_ids,
        targets.reshape(packed.target_ids.shape),
        packed.position_ids,
        packed.segments,
        0,
    )


def make_engine(family: str = "llama", model: Any = None, **optimizer: Any) -> TorchEngine:
    """Return the plain engine over a small model; `optimizer` are fields of its section."""
    module = CausalLM(model) if model is not None else make_module(family)
    return TorchEngine(
        module, OptimizerSection(**{"learning_rate": 1e-2, **optimizer}), torch.device("cpu")
    )


def train(engine: Any, steps: range, lanes: int = 2, rate: float = 1e-2) -> list[float]:
    """Train `engine` on fixed batches of `steps`; return the summed losses."""
    losses = []
    for step in steps:
        batches = [batch((7, 5), (9,), seed=step * 10 + lane, lane=lane) for lane in range(lanes)]
        count = sum(b.num_target_tokens for b in batches)
        losses.append(
            engine.train_step(
                batches, [step * 10 + lane for lane in range(lanes)], count, rate
            ).loss_sum
        )
    return losses


def tensors_of(engine: TorchEngine) -> dict[str, TensorInfo]:
    """Return the shapes of the engine's model, as a manifest lists them."""
    return {
        name: TensorInfo(shape=tuple(p.shape))
        for name, p in parameters_by_name(engine.module).items()
    }


def save(
    manager: Any, engine: Any, step: int, rows: np.ndarray | None = None, **evaluation: float
) -> str:
    """Commit a checkpoint of `engine` at `step`."""
    rows = np.array([[step - 1, 0, 0, step, 0, 5]], dtype=np.int64) if rows is None else rows
    outcome = manager.save(engine, draft(engine, step, rows, **evaluation))
    if outcome.problem is not None:
        raise outcome.problem
    return outcome.url


def draft(engine: Any, step: int, rows: np.ndarray, **evaluation: float) -> SaveRequest:
    """Return a request to save `engine` at `step`."""
    return SaveRequest(
        "r",
        type(engine).__name__,
        Progress(step=step, optimizer_step=engine.optimizer_step()),
        LedgerRows(rows),
        tensors_of(engine),
        {},
        evaluation,
    )


def checkpoints(**fields: Any) -> CheckpointSection:
    """Return a checkpoint section."""
    return CheckpointSection(**fields)


def run_config(storage: str, **sections: dict[str, Any]) -> RunConfig:
    """Return a run of four lanes in this process, never read from data."""
    whole: dict[str, Any] = {
        "run": {"name": "r", "storage": storage},
        "model": {"path": "unused", "dtype": "float32"},
        "data": {"train": "unused"},
        "batch": {"global_batch": 4, "sequence_length": 16},
        "schedule": {"steps": 6},
    }
    for name, fields in sections.items():
        whole[name] = {**whole.get(name, {}), **fields}
    return RunConfig(**whole)
