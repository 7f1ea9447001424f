"""dist_ft.json: what an export writes next to a model, read back from a folder of anyone.

It says how the model was trained, and of an adapter which model it belongs to. Nothing in it turns
an option on: of the base model only path and revision are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dist_ft.config.load import load_stored_section
from dist_ft.config.sections.tuning import TuningSection
from dist_ft.core.errors import MAX_LINE, ConfigError, ModelError
from dist_ft.pretrained import folder_files
from dist_ft.storage import filesystem

INFO_FILE = "dist_ft.json"
"""File of an exported folder with the run's task, attention, prompt template and sequence length.

Of an adapter it also holds the tuning method and the base model.
"""
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
MAX_TEMPLATE_CHARACTERS = 2**20
MAX_TOKENS = 2**31
MAX_VIRTUAL_TOKENS = 2**16
MAX_RANK = 2**16
_BASE_KEYS = ("path", "revision")
_BASE_PROTOCOLS = ("file", "local", "memory", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf")
"""Protocols a base model may have: the host follows from the user's settings, not from the URL."""


class ExportInfo(TypedDict, total=False):
    """Content of `INFO_FILE`; folders of other origin have none.

    Attributes:
        task, prompting: sections of the run's config, with labels and examples.
        attention: implementation the model was trained with.
        prompt_template: how a prompt was written without a chat template.
        sequence_length: sequence length of the training, in tokens.
        tuning: of an adapter: the run's section tuning.
        base: of an adapter: `path` and `revision` of the model it belongs to.
        int8: what int8 weights changed.
    """

    task: dict[str, Any]
    prompting: dict[str, Any]
    attention: str
    prompt_template: str
    sequence_length: int | None
    tuning: dict[str, Any]
    base: dict[str, Any]
    int8: dict[str, Any]


class BaseModel(NamedTuple):
    """The model that an adapter belongs to."""

    path: str
    revision: str | None


class AdapterInfo(NamedTuple):
    """What loading an adapter needs.

    Attributes:
        tuning: the method that added its weights.
        base: the model it belongs to.
    """

    tuning: TuningSection
    base: BaseModel


def read_export_info(folder: str | Path, shown: str) -> ExportInfo:
    """Return the content of a folder's `INFO_FILE`; empty if it has none.

    Args:
        folder: local model folder.
        shown: what the user called it, for errors.

    Raises:
        ModelError: a value is of another kind than an export writes.
    """
    path = Path(folder)
    if not (path / INFO_FILE).exists() and not (path / INFO_FILE).is_symlink():
        return {}
    info = folder_files.read_json(path, INFO_FILE, shown)

    where = f"{shown}: {INFO_FILE}"
    for key in ("task", "prompting", "tuning", "base", "int8"):
        if not isinstance(info.get(key, {}), dict | None):
            raise _refuse(where, key, info[key], "A JSON object")
    if info.get("attention", "sdpa") not in ATTENTIONS:
        raise _refuse(where, "attention", info["attention"], ", ".join(ATTENTIONS))

    template = info.get("prompt_template", "")
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARACTERS:
        raise _refuse(where, "prompt_template", template, "A text")

    length = info.get("sequence_length")
    if length is not None:
        is_number = isinstance(length, int) and not isinstance(length, bool)
        if not is_number or not 1 <= length < MAX_TOKENS:
            raise _refuse(where, "sequence_length", length, "A number of tokens")
    return info  # type: ignore[return-value]


def _refuse(where: str, key: str, value: Any, allowed: str) -> ModelError:
    return ModelError(
        f"{where}: {key}={str(value)[:MAX_LINE]}: no such value. Allowed: {allowed}. Export the "
        "model again."
    )


def read_adapter_info(folder: str | Path, shown: str) -> AdapterInfo | None:
    """Return the info of an adapter's folder, None if the folder holds none of dist_ft.

    Raises:
        ModelError: the info is damaged, or its base model would turn on options of its own.
    """
    info = read_export_info(folder, shown)
    if not info.get("tuning"):
        return None  # an export of a whole model

    where = f"{shown}: {INFO_FILE}"
    return AdapterInfo(_read_tuning(info, where), _read_base(info.get("base") or {}, where))


def _read_tuning(info: ExportInfo, where: str) -> TuningSection:
    try:
        section = load_stored_section(dict(info), "tuning", TuningSection, where)
    except ConfigError as error:
        raise ModelError(f"{where}: {error.problems[0]}") from error

    # The weights follow from these numbers, before the file that has them is opened.
    ranks = (section.lora.rank, section.adalora.initial_rank, section.bottleneck.size)
    if section.prompt.tokens > MAX_VIRTUAL_TOKENS or max(ranks) > MAX_RANK:
        raise ModelError(
            f"{where}: tuning has an absurd number. Up to {MAX_RANK} virtual tokens and ranks are "
            "allowed. Export the adapter again."
        )
    return section


def _read_base(base: Mapping[str, Any], where: str) -> BaseModel:
    """Return the base model: two texts, whatever else stands there."""
    others = sorted(str(key) for key in base if key not in _BASE_KEYS)
    if others:
        raise ModelError(
            f"{where}: base.{others[0][:MAX_LINE]} is set. An adapter gives only path and revision "
            "of its base model; options are the user's. Remove it."
        )

    path, revision = base.get("path"), base.get("revision")
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise ModelError(
            f"{where}: base.path={str(path)[:MAX_LINE]} is no model. The path or name of the "
            "adapter's base model is needed. Export the adapter again."
        )
    if not isinstance(revision, str | None):
        raise ModelError(
            f"{where}: base.revision={str(revision)[:MAX_LINE]} is no revision. A text or null is "
            "allowed. Export the adapter again."
        )

    # Such a URL names a host, which would get a request that the user never mentioned.
    protocol = path.partition("://")[0].lower()
    is_url = not filesystem.is_local(path)
    if is_url and (protocol not in _BASE_PROTOCOLS or "::" in path):
        raise ModelError(
            f"{where}: base.path={path[:MAX_LINE]} names a server. Base models are read from "
            "folders, object stores and the hub. Download it, and correct base.path."
        )
    return BaseModel(path, revision)
