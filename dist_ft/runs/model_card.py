"""The model card of an exported folder: README.md in the hub's format, from the run's facts alone.

Numbers come from the run's own evaluations and from the measurements of the export. The card says
what was not measured. It contains no credential, and only the last part of local paths.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_ft.checkpoint.export import INFO_FILE
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.config.task_facts import TASKS, task_class
from dist_ft.core import yaml_documents
from dist_ft.core.logs import redact
from dist_ft.core.printable import markdown_block, markdown_text
from dist_ft.runs.run_facts import facts, stored_config
from dist_ft.storage.documents import read_local_json_object
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
"""The hub's pipeline tag of each task; seq2seq has none that fits all its uses."""
HIDDEN_SECTIONS = ("storage", "cluster", "log")
"""Sections of the config that describe the user's machines."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class BeforeAfter(NamedTuple):
    """A measure before and after a change."""

    before: float
    after: float


def render(
    store: Store,
    manifest: Manifest,
    folder: Path,
    int8: Mapping[str, BeforeAfter] | None = None,
) -> str:
    """Return the model card of the model in `folder`.

    Args:
        store: folder of the run.
        manifest: manifest of the exported checkpoint.
        folder: folder of the exported model.
        int8: what int8 weights changed, by measure.
    """
    config = stored_config(store)
    about = read_local_json_object(folder / INFO_FILE)
    model_config = read_local_json_object(folder / "config.json")
    task = about["task"]["name"]

    run_facts = _facts(store, manifest, model_config)
    lines = [
        _front_matter(config, task, int8 is not None),
        f"# {markdown_text(str(config['run']['name']))}",
        "",
        f"{_cell(run_facts['base model'])}, fine-tuned for {_cell(task.replace('_', ' '))} with "
        "dist_ft. Written by `dist-ft export` from the facts of the run.",
        "",
        "## Training",
        "",
        *_table(("", ""), list(run_facts.items())),
    ]
    # The class of a user's own task is not imported for this: a folder named it.
    has_labels = bool(about["task"].get("labels"))
    if has_labels or (task in TASKS and task_class(task).has_labels):
        lines += _labels_section(model_config.get("id2label") or {})
    lines += ["## Scores on held-out data", "", *_scores(store, manifest.progress.step)]
    if int8:
        lines += _int8_section(int8)
    lines += ["## Limits", "", *_limits(about, task), ""]

    public_config = {name: config[name] for name in config if name not in HIDDEN_SECTIONS}
    config_text = yaml_documents.dump_without_tags(_without_paths(public_config))
    lines += ["## Config", "", *markdown_block(config_text, "yaml"), ""]

    # Once more over the finished text: a card is published, and its parts come from several files.
    return redact("\n".join(lines))


def _labels_section(names: Mapping[str, str]) -> list[str]:
    """Return the labels in the order of the head's outputs.

    Args:
        names: {number of the output: label}, the model config's id2label.
    """
    # JSON has no numbers as keys: "10" would sort before "2".
    labels = [_cell(names[number]) for number in sorted(names, key=int)]
    if not labels:
        return []
    return ["## Labels", "", ", ".join(labels), ""]


def _facts(store: Store, manifest: Manifest, model_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts of the run for the exported checkpoint, without local paths."""
    run_facts = {name: _without_local_path(value) for name, value in facts(store).items()}
    architectures = ", ".join(model_config.get("architectures") or ())
    progress = manifest.progress
    versions = [f"{library} {number}" for library, number in sorted(manifest.versions.items())]

    # The facts describe the run's latest checkpoint; the exported one may be an earlier one.
    return run_facts | {
        "architecture": f"{architectures} ({model_config.get('model_type')})",
        "trained": f"{progress.step:,} steps, {progress.num_tokens:,} tokens",
        "saved": manifest.created_at,
        "versions": ", ".join(versions),
    }


def _front_matter(config: Mapping[str, Any], task: str, is_int8: bool) -> str:
    """Return the YAML block that the hub reads."""
    base_model = str(config["model"]["path"])
    tags = ["dist_ft"]
    if is_int8:
        tags.append("int8")

    fields: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if task in PIPELINES:
        fields["pipeline_tag"] = PIPELINES[task]

    # The hub links to this name. A local folder can have the form org/name too, but means nothing
    # to others.
    if _HUB_NAME.fullmatch(base_model) and not os.path.exists(base_model):
        fields["base_model"] = base_model
    return f"---\n{_yaml(fields)}\n---\n"


def _scores(store: Store, step: int) -> list[str]:
    """Return the table of metrics at the first evaluation and at the last one up to `step`."""
    evaluations = []
    for line in read_metrics(store):
        if line["kind"] == "evaluation" and line["step"] <= step:
            evaluations.append(line)
    if not evaluations:
        return ["None: the run had no evaluation up to this step.", ""]

    first, last = evaluations[0], evaluations[-1]
    rows = []
    for name, value in last.items():
        if isinstance(value, int | float) and name not in ("step", "time", "num_target_tokens"):
            rows.append((name.replace("_", " "), _number(first.get(name)), _number(value)))

    return _table(("metric", f"step {first['step']}", f"step {last['step']}"), rows)


def _int8_section(int8: Mapping[str, BeforeAfter]) -> list[str]:
    rows = [
        (name.replace("_", " "), _number(change.before), _number(change.after))
        for name, change in int8.items()
    ]
    return [
        "## With int8 weights",
        "",
        "Measured on the exporting machine. Only weights of linear layers are int8; loading them "
        "needs torchao.",
        "",
        *_table(("measure", "before", "after"), rows),
    ]


def _limits(about: Mapping[str, Any], task: str) -> list[str]:
    lines = []
    length = about.get("sequence_length")
    if length:
        lines.append(
            f"- Trained on sequences of at most {length} tokens; longer texts were not measured."
        )

    if task in ("causal_lm", "seq2seq"):
        lines.append("- Generated text may be wrong; its content was not examined here.")

    return [
        *lines,
        "- Scores are those of the held-out data named above. Other domains, languages, bias and "
        "safety were not measured.",
        "- This card states no licence: those of the base model and of the data apply.",
    ]


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' --- |' * (len(heads) - 1)}"]
    for row in rows:
        cells = [_cell(value) for value in row]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    # Labels and paths come from users: a bar would start another column, "<" would start HTML.
    return markdown_text(str(text))


def _without_local_path(text: str) -> str:
    """Return a text with local absolute paths cut to their last part."""
    # Not after ":" or "/", which belong to a URL, nor after "*" and ".", which belong to a glob or
    # a relative path: those name nothing on the user's machine.
    return re.sub(r"(?<![\w:/.*])(?:~|file:/)?/(?:[^\s,:'\"]*/)([^\s/,:'\"]+)", r"\1", text)


def _without_paths(value: Any) -> Any:
    """Return nested values with local absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    if isinstance(value, str):
        return _without_local_path(value)
    return value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)).rstrip()
