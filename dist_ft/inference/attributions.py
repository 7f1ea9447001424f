"""Which tokens led to a wrong prediction, by integrated gradients.

Sundararajan et al., arXiv:1703.01365; computed by captum.

The model of a checkpoint is run again on the examples that an evaluation stored. The weight of a
token is its share of the predicted score (the logit of the label, of the wrong tags, of the ends of
the answer), compared with a text of padding; tokens with positive weights raised the score. The
weights of a text sum up to about the difference between the two scores. Float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from dist_ft.checkpoint import discovery, trained_model
from dist_ft.checkpoint import manifest as manifests
from dist_ft.core.errors import ConfigError
from dist_ft.storage.filesystem import Store
from dist_ft.tasks.base import Task, make_task

NUM_STEPS = 32
"""Points on the path from padding to the text."""
BATCH_SIZE = 8


class AttributionInfo(TypedDict):
    """Where attributions come from: step of the checkpoint, and method."""

    step: int
    method: str


def attribute(
    store: Store, examples: Sequence[dict[str, Any]], step: int | None
) -> AttributionInfo:
    """Add `tokens`, [text, weight] of each token except the special ones, to `examples`.

    Args:
        store: store of the run.
        examples: see `dist_ft.training.error_examples.ErrorExample`.
        step: step at which the examples were evaluated; its checkpoint is used if it still exists,
            else the latest.

    Raises:
        ConfigError: captum is not installed.
        CheckpointError: the run has no sound checkpoint.
    """
    import torch

    from dist_ft.model.task_models import SpecialTokens, TaskModel

    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise ConfigError(
            [
                "--attributions: needs captum, which is not installed. pip install "
                "'dist-ft[explain]'."
            ],
            "runs report",
        ) from error

    names = discovery.list_committed(store)
    committed = [(manifests.parse_folder(name) or (0, 0))[0] for name in names]
    manifest = trained_model.find_manifest(store, step if step in committed else None)
    model, tokenizer = trained_model.load_trained_model(store, manifest, "float32")
    section = trained_model.load_task(store)
    task = make_task(section)
    special_tokens = SpecialTokens.from_tokenizer(tokenizer, model.config)
    task_model = TaskModel(model, section, special_tokens).eval()
    special_ids = set(tokenizer.all_special_ids)
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id or 0

    for example in examples:
        ids = example["ids"]
        padding = [token if token in special_ids else pad_id for token in ids]
        method = LayerIntegratedGradients(
            _score_function(task_model, task, example["at"]),
            model.get_input_embeddings(),
        )
        gradients = method.attribute(
            torch.tensor([ids]),
            baselines=torch.tensor([padding]),
            n_steps=NUM_STEPS,
            internal_batch_size=BATCH_SIZE,
        )  # (1, T, H)
        weights = gradients.sum(-1)[0].detach().tolist()
        example["tokens"] = [
            [text, round(weight, 6)]
            for token, text, weight in zip(ids, token_texts(tokenizer, ids), weights, strict=True)
            if token not in special_ids
        ]
    return {
        "step": manifest.progress.step,
        "method": f"integrated gradients, {NUM_STEPS} points, from a text of padding",
    }


def _score_function(task_model: Any, task: Task, at: Any) -> Callable[[Any], Any]:
    """Return the function whose gradients are computed: ids (B, T) to the predicted score (B,)."""
    import torch

    def score(ids: Any) -> Any:
        outputs = task_model.run_model(ids, torch.ones_like(ids))
        return task.score_for_attribution(outputs, at)

    return score


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, in order; the start of a word has a space in front."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    is_word_piece = '"WordPiece"' in tokenizer.backend_tokenizer.to_str()[-(10**7) :]
    texts = []
    for token, name in zip(ids, names, strict=True):
        if is_word_piece:
            texts.append(name[2:] if name.startswith("##") else f" {name}")
            continue
        text = str(tokenizer.decode([token]))
        starts_word = name.startswith(("Ġ", "▁"))
        texts.append(f" {text.lstrip()}" if starts_word else text)
    return texts
