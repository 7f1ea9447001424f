"""The model card of an exported folder (README.md in the hub's format), written from what was run and nothing else.

Numbers are those of the run's own evaluations and of the export's measurements. What nobody measured is said to be not
measured. No credential, and of paths on a local disk only the last part.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_ft.checkpoint.export import ABOUT
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.core.logs import redact
from dist_ft.model.heads import LABELLED
from dist_ft.runs.run_facts import facts, stored_config
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import read_metrics

PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "multi_label": "text-classification",
    "regression": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "masked_lm": "fill-mask",
    "embedding": "feature-extraction",
}
"""The hub's names of tasks; an encoder-decoder has none that fits all it may do."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def render(
    store: Store,
    manifest: Manifest,
    folder: Path,
    int8: dict[str, tuple[float, float]] | None = None,
) -> str:
    """Return the card of the model in `folder`.

    Args:
        store: of the run.
        manifest: of the checkpoint it is of.
        folder: the exported one.
        int8: what int8 weights changed.
    """
    config, about = stored_config(store), json.loads((folder / ABOUT).read_text("utf-8"))
    kind = json.loads((folder / "config.json").read_text("utf-8"))
    task, labels = about["task"]["name"], []
    if task in LABELLED:
        named = kind.get("id2label") or {}
        labels = [named[number] for number in sorted(named, key=int)]
    told = {name: _public(value) for name, value in facts(store).items()}
    told["architecture"] = (
        f"{', '.join(kind.get('architectures') or ())} ({kind.get('model_type')})"
    )
    told |= {
        "trained": f"{manifest.progress.step:,} steps, {manifest.progress.num_tokens:,} tokens",
        "saved": manifest.created_at,
        "versions": ", ".join(
            f"{name} {number}" for name, number in sorted(manifest.versions.items())
        ),
    }
    parts = [
        _head(config, task, int8 is not None),
        f"# {config['run']['name']}",
        "",
        f"{told['base model']}, fine-tuned for {task.replace('_', ' ')} with dist_ft. Written by "
        "`dist-ft export` from what was run.",
        "",
        "## Training",
        "",
        *_table(("", ""), [(name, value) for name, value in told.items()]),
    ]
    if labels:
        parts += ["## Labels", "", ", ".join(_cell(label) for label in labels), ""]
    parts += ["## Scores on held-out data", "", *_scores(store, manifest.progress.step)]
    if int8:
        parts += [
            "## With int8 weights",
            "",
            "Measured on the machine that exported; weights of linear layers only "
            "(torchao, which is needed to load them).",
            "",
            *_table(
                ("measure", "before", "after"),
                [(name.replace("_", " "), _number(a), _number(b)) for name, (a, b) in int8.items()],
            ),
        ]
    parts += [
        "## Limits",
        "",
        *_limits(about, task),
        "",
        "## Config",
        "",
        "```yaml",
        _yaml(
            _shared(
                {name: config[name] for name in config if name not in ("storage", "cluster", "log")}
            )
        ),
        "```",
        "",
    ]
    return redact("\n".join(parts))


def _head(config: dict[str, Any], task: str, is_int8: bool) -> str:
    """Return the YAML head that the hub reads."""
    base = str(config["model"]["path"])
    told: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["dist_ft", *(["int8"] if is_int8 else [])],
    }
    if task in PIPELINES:
        told["pipeline_tag"] = PIPELINES[task]
    if _HUB_NAME.fullmatch(base) and not os.path.exists(base):
        told["base_model"] = base
    return f"---\n{_yaml(told)}\n---\n"


def _scores(store: Store, step: int) -> list[str]:
    """Return the table of metrics at the first evaluation and at the last one up to `step`."""
    lines = [
        line
        for line in read_metrics(store)
        if line["kind"] == "evaluation" and line["step"] <= step
    ]
    if not lines:
        return ["None: the run had no evaluation up to this step.", ""]
    first, last = lines[0], lines[-1]
    names = [
        name
        for name, value in last.items()
        if isinstance(value, int | float) and name not in ("step", "time", "num_target_tokens")
    ]
    rows = [
        (name.replace("_", " "), _number(first.get(name)), _number(last[name])) for name in names
    ]
    return _table(("metric", f"step {first['step']}", f"step {last['step']}"), rows)


def _limits(about: dict[str, Any], task: str) -> list[str]:
    length = about.get("sequence_length")
    lines = (
        [f"- Trained on sequences of at most {length} tokens; longer texts were not measured."]
        if length
        else []
    )
    if task in ("causal_lm", "seq2seq"):
        lines.append("- Texts it makes may be wrong; what they hold was not examined here.")
    return [
        *lines,
        "- Scores are those of the held-out data named above; other domains, languages, bias and safety "
        "were not measured.",
        "- No licence is stated here: that of the base model and of the data apply.",
    ]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"| --- |{' --- |' * (len(heads) - 1)}",
        *(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows),
        "",
    ]


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def _public(text: str) -> str:
    """Return a text with local absolute paths cut to their last part."""
    return re.sub(r"(?<![\w:/.*])(?:~|file:/)?/(?:[^\s,:'\"]*/)([^\s/,:'\"]+)", r"\1", text)


def _shared(value: Any) -> Any:
    """Return nested values without local absolute paths, as `_public`."""
    if isinstance(value, dict):
        return {name: _shared(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_shared(own) for own in value]
    return _public(value) if isinstance(value, str) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)).rstrip()
