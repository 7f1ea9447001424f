"""Which tokens led to a wrong prediction, by integrated gradients.

Sundararajan et al., arXiv:1703.01365; computed by captum.

The model of a checkpoint runs again on the examples that an evaluation stored, in float32 on the
CPU. The baseline of a text is the same text with padding tokens in place of its words. The
attribution of a token is its part of the difference between the predicted scores of the text and of
the baseline; a positive one raised the score. The attributions of a text sum to about the whole
difference. The predicted score is the sum of the logits of the predicted labels, of the wrong tags,
or of the two ends of the answer.

Dimensions: B points on the path from the baseline to the text, T tokens of the text, H hidden size.
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
"""Points on the path from the baseline to the text."""
BATCH_SIZE = 8
"""Points in one forward pass."""


class AttributionInfo(TypedDict):
    """How attributions were computed: step of the checkpoint, and method as text."""

    step: int
    method: str


def attribute(
    store: Store, examples: Sequence[dict[str, Any]], step: int | None
) -> AttributionInfo:
    """Add `tokens` to each example, in place: [text, attribution] of all but special tokens.

    Args:
        store: store of the run.
        examples: see `dist_ft.training.error_examples.ErrorExample`.
        step: step at which the examples were evaluated; its checkpoint is used if it still exists,
            else the latest.

    Raises:
        ConfigError: captum is not installed.
        CheckpointError: the run has no intact checkpoint.
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
        # The baseline keeps special tokens, so their attributions are 0 and the whole difference in
        # score goes to the words.
        baseline = [token if token in special_ids else pad_id for token in ids]
        integrated_gradients = LayerIntegratedGradients(
            _score_function(task_model, task, example["at"]),
            model.get_input_embeddings(),
        )
        attributions = integrated_gradients.attribute(
            torch.tensor([ids]),
            baselines=torch.tensor([baseline]),
            n_steps=NUM_STEPS,
            internal_batch_size=BATCH_SIZE,
        )  # (1, T, H)

        # The attribution of a token is the sum over the dimensions of its embedding.
        token_attributions = attributions.sum(-1)[0].detach().tolist()  # (T,)
        tokens = []
        texts = token_texts(tokenizer, ids)
        for token, text, attribution in zip(ids, texts, token_attributions, strict=True):
            if token not in special_ids:
                tokens.append([text, round(attribution, 6)])
        example["tokens"] = tokens

    return {
        "step": manifest.progress.step,
        "method": f"integrated gradients, {NUM_STEPS} points, from a text of padding",
    }


def _find_manifest(store: Store, step: int | None) -> manifests.Manifest:
    """Return the manifest of the checkpoint of `step`, or of the latest if that was removed."""
    committed_steps = []
    for name in discovery.list_committed(store):
        committed_step, _ = manifests.parse_folder(name) or (0, 0)
        committed_steps.append(committed_step)

    # Retention may have removed it since the evaluation. `attribute` returns the step that was used
    # instead.
    if step not in committed_steps:
        step = None

    return trained_model.find_manifest(store, step)


def _score_function(task_model: Any, task: Task, at: Any) -> Callable[[Any], Any]:
    """Return the function whose gradients are computed: ids (B, T) to the predicted score (B,)."""
    import torch

    def score(ids: Any) -> Any:
        # The mask is all ones: the B points have the same length, and the padding tokens of the
        # baseline are attended to like the words they replace.
        outputs = task_model.run_model(ids, torch.ones_like(ids))
        return task.score_for_attribution(outputs, at)

    return score


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, in order, with a space before the start of a word."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    is_word_piece = '"WordPiece"' in tokenizer.backend_tokenizer.to_str()[-(10**7) :]
    texts = []
    for token, name in zip(ids, names, strict=True):
        # WordPiece marks the tokens that continue a word, by ##.
        if is_word_piece:
            if name.startswith("##"):
                texts.append(name[2:])
            else:
                texts.append(f" {name}")
            continue

        # Byte-level BPE and SentencePiece mark those that start one, by Ġ or ▁. In the names of
        # byte-level tokens each byte is a character, so the text comes from the decoder, which may
        # drop the space in front.
        text = str(tokenizer.decode([token]))
        if name.startswith(("Ġ", "▁")):
            text = f" {text.lstrip()}"
        texts.append(text)

    return texts
