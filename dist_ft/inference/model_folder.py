"""A model folder as inference reads it: its task, its weights, and what identifies them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dist_ft.checkpoint import initial_weights
from dist_ft.config.load import load_stored_section
from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.config.sections.decoding import DecodingSection, format_strategy, parse_strategy
from dist_ft.config.sections.prompting import PromptingSection, get_model_task
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ModelError
from dist_ft.model.loading.download import fetch_model
from dist_ft.model.loading.load import load_task_model, load_tokenizer
from dist_ft.pretrained import export_info, pretrained_model
from dist_ft.pretrained.export_info import ExportInfo
from dist_ft.pretrained.pretrained_model import Source

log = logging.getLogger("dist_ft.predict")
TASK_BY_CLASS_SUFFIX = {
    "SequenceClassification": "sequence_classification",
    "TokenClassification": "token_classification",
    "QuestionAnswering": "question_answering",
    "ConditionalGeneration": "seq2seq",
    "CausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "MaskedLM": "masked_lm",
}
"""The task of a transformers class, by the end of its name."""
TASK_BY_PROBLEM_TYPE = {"multi_label_classification": "multi_label", "regression": "regression"}


@dataclass(frozen=True)
class PredictionOptions:
    """How a model is applied to rows.

    Attributes:
        batch_size: rows in a batch.
        max_new_tokens: length limit of generated text, in tokens.
        strategy: decoding strategy (`config.decoding.parse_strategy`); random draws follow from the
            number of the row.
    """

    batch_size: int = 32
    max_new_tokens: int = 128
    strategy: str = "greedy"

    def decoding(self) -> DecodingSection:
        """Return the decoding section; raises ConfigError if the strategy does not exist."""
        section = DecodingSection(max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        return parse_strategy(self.strategy, section)


DEFAULT_OPTIONS = PredictionOptions()


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, ready for inference.

    Attributes:
        task: what it does, with labels.
        prompting: how it is prompted for labels, if it is.
        info: what its export wrote.
    """

    model: Any
    tokenizer: Any
    task: TaskSection
    prompting: PromptingSection
    info: ExportInfo


def load_folder(path: str, device: str) -> LoadedModel:
    """Load the model at `path` (folder, URL, hub name).

    Raises ModelError if it does not exist, or if weights of the head are missing.
    """
    location = initial_weights.resolve_model_section(ModelSection(path=path)).path
    folder = fetch_model(location)
    info = export_info.read_export_info(folder, f"model.path={path}")
    info_file = Path(folder) / export_info.INFO_FILE
    prompting = load_stored_section(
        cast("dict[str, Any]", info), "prompting", PromptingSection, str(info_file)
    )
    task = _read_task(path, folder, info, prompting)

    # On many CPUs, products of bfloat16 are far slower than those of float32.
    dtype = "float32"
    if device == "cuda":
        dtype = "bfloat16"

    attention = _choose_attention(info.get("attention", "sdpa"), device)
    # by its own place, near which the base model of an adapter may be
    section = ModelSection.model_validate(
        {"path": location, "dtype": dtype, "attention": attention}
    )
    tokenizer = load_tokenizer(section)

    # A model that is prompted for labels is loaded as what it is: a causal model, without a head.
    model = _load_model(get_model_task(task, prompting), section, tokenizer, path)
    return LoadedModel(model.to(device), tokenizer, task, prompting, info)


def model_version(path: str, options: PredictionOptions) -> str:
    """Return a text that changes with the weights at `path` and the options of predictions."""
    decoding = options.decoding()

    # Names, sizes and times of files stand for the weights: reading them all would take as long as
    # loading the model. The batch size is left out, as predictions do not depend on it.
    files = []
    for file in Path(_local_folder(path)).glob("*.safetensors"):
        status = file.stat()
        files.append((file.name, status.st_size, status.st_mtime_ns))

    return json.dumps(
        [path, options.max_new_tokens, format_strategy(decoding), decoding.seed, *sorted(files)]
    )


def detect_task(config: Any, path: str) -> TaskSection:
    """Return the task of the model with this transformers `config`, with its labels."""
    name = _task_of_architecture(config.architectures or ())

    # Three tasks share the class. `problem_type` says which one it is, but not every model sets it:
    # then a single output is a number, as in transformers itself.
    if name == "sequence_classification":
        default = name
        if config.num_labels == 1:
            default = "regression"
        name = TASK_BY_PROBLEM_TYPE.get(config.problem_type or "", default)

    if name == "masked_lm":
        raise ModelError(
            f"model.path={path}: is a masked language model, which has no answer to a text. "
            "Models with a head, causal models and encoder-decoders are allowed. Train one."
        )

    # In the order of the outputs, which that of the JSON need not be.
    labels: tuple[str, ...] = ()
    if task_class(name).has_labels:
        labels = tuple(str(label) for _, label in sorted((config.id2label or {}).items()))

    return TaskSection.model_validate({"name": name, "labels": labels})


def _task_of_architecture(architectures: Sequence[str]) -> str:
    for architecture in architectures:
        for suffix, task in TASK_BY_CLASS_SUFFIX.items():
            if architecture.endswith(suffix):
                return task

    # Any other class is a model without a head, such as BertModel: its vectors are all it has.
    return "embedding"


def _local_folder(path: str) -> str:
    return fetch_model(initial_weights.resolve_model_section(ModelSection(path=path)).path)


def _read_task(
    path: str, folder: str, info: ExportInfo, prompting: PromptingSection
) -> TaskSection:
    """Return the task of the model in a folder, by its config.json and by what an export adds."""
    config = pretrained_model.read_config(Source(folder, f"model.path={path}"))

    # The files of a prompted model are those of a causal model: they know neither task nor labels.
    stored = cast("dict[str, Any]", info)
    if prompting.method == "likelihood":
        return load_stored_section(stored, "task", TaskSection, path)

    task = detect_task(config, path)
    if "task" not in info:
        return task

    # An export also says what the class of the model does not, such as columns and pooling. The
    # labels are those of the head that answers.
    exported_task = load_stored_section(stored, "task", TaskSection, path)
    return exported_task.model_copy(
        update={"labels": task.labels, "new_head": False, "grow_head": False}
    )


def _choose_attention(trained_with: str, device: str) -> str:
    """Return the attention implementation to use: flash attention has kernels for GPUs only."""
    if device == "cpu" and "flash" in trained_with:
        log.warning(
            "model.attention=%s: needs a GPU; using sdpa, which computes the same", trained_with
        )
        return "sdpa"

    return trained_with


def _load_model(task: TaskSection, section: ModelSection, tokenizer: Any, path: str) -> Any:
    """Return the model in evaluation mode; raises ModelError if its head was never trained."""
    model, new_weights = load_task_model(task, section)
    if new_weights:
        raise ModelError(
            f"model.path={path}: {len(new_weights)} weights of the head are not in the files, "
            f"such as {min(new_weights)}, and predictions would be random. A trained head is "
            "required. Train it first."
        )

    # Heads that pool the last token of a row find it by the id of the padding, so the model must
    # have the tokenizer's.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval()
