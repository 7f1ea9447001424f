"""Which tokens led to a wrong prediction, by integrated gradients.

Sundararajan et al., arXiv:1703.01365; computed by captum.

The model of a checkpoint is run again on the examples that an evaluation stored. The weight of a
token is its share of the predicted score (the logit of the label, of the wrong tags, of the ends of
the answer), compared with a text of padding; tokens with positive weights raised the score. The
weights of a text sum up to about the difference between the two scores. Float32 on the CPU.

Dimensions: B points on the path, T tokens of the text, H hidden size.
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

    manifest = _find_manifest(store, step)
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
        # Special tokens are the same at both ends of the path, so their weight is 0 and the whole
        # difference in score goes to the words.
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

        # The share of a token is the sum over the dimensions of its input vector.
        weights = gradients.sum(-1)[0].detach().tolist()
        tokens = []
        texts = token_texts(tokenizer, ids)
        for token, text, weight in zip(ids, texts, weights, strict=True):
            if token not in special_ids:
                tokens.append([text, round(weight, 6)])
        example["tokens"] = tokens

    return {
        "step": manifest.progress.step,
        "method": f"integrated gradients, {NUM_STEPS} points, from a text of padding",
    }


def _find_manifest(store: Store, step: int | None) -> manifests.Manifest:
    """Return the manifest of the checkpoint of `step`, or of the latest if that is gone."""
    committed_steps = []
    for name in discovery.list_committed(store):
        committed_step, _ = manifests.parse_folder(name) or (0, 0)
        committed_steps.append(committed_step)

    # Retention may have removed it since the evaluation. The latest stands in for it; the step that
    # is used is part of the result.
    if step not in committed_steps:
        step = None

    return trained_model.find_manifest(store, step)


def _score_function(task_model: Any, task: Task, at: Any) -> Callable[[Any], Any]:
    """Return the function whose gradients are computed: ids (B, T) to the predicted score (B,)."""
    import torch

    # All points on the path have the tokens of one text, without padding at its end: (B, T) ones.
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
        # WordPiece marks the tokens that continue a word.
        if is_word_piece:
            if name.startswith("##"):
                texts.append(name[2:])
            else:
                texts.append(f" {name}")
            continue

        # Byte-level BPE and SentencePiece mark those that start one. Their names spell bytes, so
        # the text itself comes from the decoder, which may drop the blank in front.
        text = str(tokenizer.decode([token]))
        if name.startswith(("Ġ", "▁")):
            text = f" {text.lstrip()}"
        texts.append(text)

    return texts
