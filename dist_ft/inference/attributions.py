"""Which tokens spoke for a wrong answer: integrated gradients (Sundararajan et al., arXiv:1703.01365) by captum.

The model of a checkpoint is asked again about the examples an evaluation kept; a token's weight is its share of what
the model told (the logit of the label, of the wrong tags, of the answer's ends), against a text of padding: positive
weights spoke for it. Weights of a text sum up to about the difference between the two. Float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dist_ft.checkpoint import discovery, export
from dist_ft.checkpoint import manifest as manifests
from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ConfigError
from dist_ft.storage.filesystem import Store

STEPS = 32
"""Points on the way from padding to the text."""
AT_ONCE = 8


def attribute(store: Store, examples: Sequence[dict[str, Any]], step: int | None) -> dict[str, Any]:
    """Add `tokens`, [text, weight] of each token but the special ones, to `examples`; say how.

    Args:
        store: of the run.
        examples: see `dist_ft.training.error_examples.described`.
        step: of their evaluation; its checkpoint is asked if it is still there, else the newest.

    Raises:
        ConfigError: captum is not installed.
        CheckpointError: there is no sound checkpoint.
    """
    import torch

    from dist_ft.model.task_models import SpecialTokens, TaskModel

    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise ConfigError(
            [
                "--attributions: needs captum, which is not installed; pip install 'dist-ft[explain]'"
            ],
            "runs report",
        ) from error
    steps = [(manifests.parse_folder(name) or (0, 0))[0] for name in discovery.list_committed(store)]
    found = export.find_manifest(store, step if step in steps else None)
    model, tokenizer = export.load_trained(store, found, "float32")
    task = export.load_task(store)
    asked = TaskModel(model, task, SpecialTokens.from_tokenizer(tokenizer, model.config)).eval()
    special = set(tokenizer.all_special_ids)
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    for example in examples:
        ids = torch.tensor([example["ids"]])
        baseline = torch.tensor([[token if token in special else pad for token in example["ids"]]])
        method = LayerIntegratedGradients(
            _teller(asked, task, example["at"]), model.get_input_embeddings()
        )
        weights = method.attribute(
            ids, baselines=baseline, n_steps=STEPS, internal_batch_size=AT_ONCE
        )
        weights = weights.sum(-1)[0].detach().tolist()
        pieces = words(tokenizer, example["ids"])
        example["tokens"] = [
            [piece, round(weight, 6)]
            for token, piece, weight in zip(example["ids"], pieces, weights, strict=True)
            if token not in special
        ]
    return {
        "step": found.progress.step,
        "method": f"integrated gradients, {STEPS} points, from a text of padding",
    }


def _teller(asked: Any, task: TaskSection, at: Any) -> Callable[[Any], Any]:
    """Return the function whose gradients are taken: ids (B, T) to what was told (B,)."""
    import torch

    def told(ids: Any) -> Any:
        outputs = asked.run_model(ids, torch.ones_like(ids))
        if task.name == "question_answering":
            return outputs.start_logits[:, at[0]] + outputs.end_logits[:, at[1]]
        if task.name == "token_classification":
            return sum(outputs.logits[:, place, tag] for place, tag in at)
        return outputs.logits[:, at].sum(1)

    return told


def words(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return tokens as they are read one after the other: what begins a word begins with a blank."""
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    by_piece = '"WordPiece"' in tokenizer.backend_tokenizer.to_str()[-(10**7) :]
    found = []
    for token, name in zip(ids, raw, strict=True):
        if by_piece:
            found.append(name[2:] if name.startswith("##") else f" {name}")
        else:
            text = str(tokenizer.decode([token]))
            found.append(f" {text.lstrip()}" if name.startswith(("Ġ", "▁")) else text)
    return found
