"""The section `data`: sources of samples, how they become sequences, and how sources are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat

from dist_ft.config.sections.prompting import template_problem
from dist_ft.config.sections.section import Identity, Section

DEFAULT_BUCKET = 64
"""Default of data.bucket for tasks with padded batches."""


class Source(Section):
    """A data set: a URL, a glob or a hub name."""

    # The name as well: metrics of a run refer to sources by it.
    path: str = Identity(
        description=(
            "fsspec URL, file, folder or glob of shards (.jsonl, .parquet, .arrow, .csv, .txt; "
            ".jsonl and .csv also .gz or .zst); or a Hugging Face data set (org/name)."
        )
    )
    name: str | None = Identity(
        None, description="Name of the source in metrics; default: source-0, source-1, ..."
    )
    weight: float | None = Identity(
        None,
        gt=0,
        description=(
            "Fraction of the sequences that come from this source, relative to the weights of the "
            "others; default: proportional to its size."
        ),
    )
    repeat: float | None = Identity(
        None,
        gt=0,
        description=(
            "Repetitions of this source per epoch (0.5: half of it, 2: twice), in place of weight; "
            "default: 1."
        ),
    )
    share: float | None = Identity(
        None,
        gt=0,
        lt=1,
        description=(
            "Fraction of an epoch's sequences that come from this source, in addition to sources "
            "without a share, which come by repeat: for a replay of older data; default: by weight "
            "or repeat."
        ),
    )
    subset: str | None = Identity(
        None, description="Configuration of a Hugging Face data set; default: its default."
    )
    split: str = Identity("train", description="Split of a Hugging Face data set.")

    def without_mixing(self) -> Source:
        """Return the source without weight, repeat and share."""
        return self.model_copy(update={"weight": None, "repeat": None, "share": None})


def _as_sources(value: Any) -> Any:
    """Accept one source or several, each as a bare string or a mapping."""
    values = value if isinstance(value, list | tuple) else [value]

    sources = []
    for item in values:
        sources.append({"path": item} if isinstance(item, str) else item)
    return tuple(sources)


class MixingPhase(Section):
    """Weights of the sources at a step; linear between two phases, constant after the last."""

    until_step: int = Identity(ge=0, description="Step at which the weights are reached.")
    weights: tuple[NonNegativeFloat, ...] = Identity(
        min_length=1, description="One weight per source, in the order of data.train."
    )


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class FieldsSection(Section):
    """Names of the columns that samples are read from."""

    messages: str = Identity(
        "messages", description="format chat: column with a list of {role, content}."
    )
    prompt: str = Identity("prompt", description="format instruction: column with the prompt.")
    response: str = Identity(
        "response", description="format instruction: column with the response, the target."
    )
    system: str | None = Identity(
        None, description="format instruction: column with a system prompt; default: none."
    )
    text: str = Identity("text", description="format text: column with the text.")


class AugmentSection(Section):
    """Random changes of words of training texts, drawn for each epoch (EDA, arXiv:1901.11196)."""

    probability: float = Identity(
        1.0, gt=0, le=1, description="Probability that a text is changed in an epoch."
    )
    synonyms: str | None = Identity(
        None,
        description=(
            "File or fsspec URL of lines `word<TAB>synonym,synonym`; stored with the run when it "
            "starts; default: none."
        ),
    )
    replace: float = Identity(
        0.0,
        ge=0,
        le=1,
        description="Probability that a word with synonyms is replaced by one of them.",
    )
    swap: float = Identity(
        0.0,
        ge=0,
        le=1,
        description="Probability that a word is swapped with another one of its text.",
    )
    delete: float = Identity(0.0, ge=0, lt=1, description="Probability that a word is deleted.")


class DataSection(Section):
    """Training samples, and how they become sequences."""

    train: Sources = Identity(min_length=1, description="Training data: one source or a list.")
    format: Literal["auto", "chat", "instruction", "text", "tokens"] = Identity(
        "auto",
        description=(
            "Format of a row; auto: by its columns (input_ids; messages; prompt and response; "
            "text)."
        ),
    )
    # The fields of this section are marked, not the section: changes are reported by field.
    fields: FieldsSection = Field(default_factory=FieldsSection, description="Column names.")
    prompt_template: str = Identity(
        "{prompt}\n",
        description=(
            "format instruction with a tokenizer without a chat template: text before the response."
        ),
    )
    system_prompt: str | None = Identity(
        None,
        description=(
            "formats chat and instruction: system prompt of rows without their own; default: none."
        ),
    )
    targets: Literal["response", "all"] = Identity(
        "response",
        description=(
            "Target tokens: responses (assistant turns) only, or all tokens. In plain text all "
            "tokens are targets."
        ),
    )
    shuffle: bool = Identity(
        True, description="Shuffle samples in each epoch by run.seed; off: in their stored order."
    )
    # Not part of the identity: a run keeps the order that it started with.
    order: Literal["auto", "streamed", "indexed"] = Field(
        "auto",
        description=(
            "Order of the samples. streamed: training starts after the listing, for large sources "
            "in runs by schedule.steps. indexed: all data is tokenized before step 1. auto: "
            "streamed where sources and settings allow it."
        ),
    )
    pack: bool = Identity(
        True,
        description=(
            "Pack several samples, isolated from each other, into a sequence; off: one sample per "
            "sequence, as always if task.name is not causal_lm."
        ),
    )
    # None, as the default depends on the task (`RunConfig.effective_data`).
    bucket: int | None = Identity(
        None,
        ge=0,
        description=(
            "Without packing: build micro-batches of samples of similar length among this number "
            "of micro-batches; 0: in order; default: 64 (causal_lm: 0)."
        ),
    )
    # Samples are packed and shuffled within blocks: their size decides which ones share a step.
    block_mib: float = Identity(
        16,
        gt=0,
        le=4096,
        description=(
            "MiB of consecutive source data that are read, tokenized, cached and packed together."
        ),
    )
    shuffle_blocks: int = Identity(
        16,
        ge=1,
        description=(
            "Blocks whose sequences are shuffled together, over all lanes; more blocks shuffle "
            "better and read more at a time."
        ),
    )
    temperature: float | None = Identity(
        None,
        gt=0,
        description=(
            "Several sources: weights are sizes ** (1 / temperature); 1: proportional to size, "
            "above 1: small sources get more; default: by weight and repeat."
        ),
    )
    mixing: tuple[MixingPhase, ...] = Identity(
        (),
        description=(
            "Weights that change over the run: phases {until_step, weights}, linear between them; "
            "empty: constant weights."
        ),
    )
    bad_rows: Literal["error", "skip"] = Identity(
        "error",
        description=(
            "A row that cannot be used: stop with an error that names it, or skip it, counted and "
            "reported."
        ),
    )
    # Not part of the identity: it only decides when to give up, not which rows are skipped.
    max_bad_rows: int = Field(
        100, ge=0, description="bad_rows=skip: more skipped rows than this are an error."
    )
    # Part of the identity: with bad_rows=skip it decides which rows are skipped.
    max_row_mib: float = Identity(
        64,
        gt=0,
        le=1024,
        description=(
            "MiB of the largest row (a line, or a record of CSV) before tokenization; a larger one "
            "cannot be used. Bounds the memory for damaged or hostile shards."
        ),
    )
    overlong: Literal["error", "truncate", "drop", "split"] = Identity(
        "error",
        description=(
            "A sample longer than batch.sequence_length: stop with an error, truncate it, drop it, "
            "or (plain text only) split it into several sequences."
        ),
    )
    augment: AugmentSection = Field(
        default_factory=AugmentSection,
        description="Augmentation of training texts (tasks with labels and regression).",
    )
    # From here on: where and how fast data is prepared, which changes no sample.
    cache_dir: str | None = Field(
        None,
        description=(
            "Local folder of tokenized blocks and downloaded models, shared by a node's workers; "
            "default: ~/.cache/dist_ft."
        ),
    )
    cache_gib: float = Field(
        200,
        gt=0,
        description="Limit of tokenized blocks in GiB; the least recently used are removed.",
    )
    tokenizer_processes: int = Field(
        1,
        ge=0,
        description=(
            "Processes per worker that tokenize while training runs; 0: the worker tokenizes. "
            "Small data never needs one."
        ),
    )
    prefetch_steps: int = Field(2, ge=1, description="Steps to prepare ahead of training.")

    @property
    def max_row_bytes(self) -> int:
        """Bytes of the largest row."""
        return max(1, round(self.max_row_mib * 2**20))


def _weights(data: DataSection) -> Iterator[str]:
    sources = data.train

    # Weights are relative to each other, so a source without one would have no place among them.
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        missing = next(source for source in sources if source.weight is None)
        yield (
            f"data.train: {missing.path} has no weight and others have. Either all sources have "
            "one or none. Give it one, or use repeat."
        )

    # Each of weight, repeat and temperature alone decides how often a source comes.
    has_repeat = any(source.repeat is not None for source in sources)
    if weighted and has_repeat:
        yield (
            "data.train: weight and repeat are both set. Only one of them is allowed. Remove the "
            "other."
        )

    if data.temperature is not None and (weighted or has_repeat):
        yield (
            f"data.temperature={data.temperature}: weight or repeat of a source is also set. Only "
            "one of them is allowed. Remove the other."
        )


def _shares(data: DataSection) -> Iterator[str]:
    sources = data.train
    shared = [source for source in sources if source.share is not None]
    if not shared:
        return

    # The others get what the shares leave, so there must be others, and something left.
    total = sum(source.share or 0.0 for source in shared)
    num_others = len(sources) - len(shared)
    if total >= 1 or not num_others:
        yield (
            f"data.train: sources with a share leave {max(0.0, 1 - total):g} to {num_others} "
            "others. Allowed: shares with a sum below 1, and at least one source without. Lower "
            "them."
        )

    has_weight = any(source.weight is not None for source in sources)
    has_repeat = any(source.repeat is not None for source in shared)
    if has_weight or data.mixing or data.temperature is not None or has_repeat:
        yield (
            "data.train: share of a source is set together with weight, data.mixing, "
            "data.temperature, or its repeat. Only one of them is allowed. Remove the others."
        )


def _mixing_phases(data: DataSection) -> Iterator[str]:
    for number, phase in enumerate(data.mixing):
        if len(phase.weights) != len(data.train) or not sum(phase.weights):
            yield (
                f"data.mixing.{number}.weights={list(phase.weights)}: data.train has "
                f"{len(data.train)} sources. Needed: one weight for each, and one above 0. Correct "
                "them."
            )

    # Weights are interpolated between phases: two at one step would leave no line between them.
    steps = [phase.until_step for phase in data.mixing]
    if steps != sorted(set(steps)) or 0 in steps:
        yield (
            f"data.mixing: until_step is {', '.join(map(str, steps))}. Steps must start at 1 or "
            "later and increase. Put them in order."
        )


def _source_names(data: DataSection) -> Iterator[str]:
    names = [source.name for source in data.train if source.name is not None]
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        yield (
            f"data.train: two sources are named {duplicate}. Metrics need different names. Rename "
            "one."
        )


def _prompt_template(data: DataSection) -> Iterator[str]:
    # Here and not at the first row: data.bad_rows=skip would skip every row because of it.
    problem = template_problem(data.prompt_template, "data.prompt_template", ("prompt", "system"))
    if problem is not None:
        yield problem


CHECKS = (_weights, _shares, _mixing_phases, _source_names, _prompt_template)
