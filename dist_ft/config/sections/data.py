"""The data section: where samples come from, how they become sequences, how sources are mixed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat

from dist_ft.config.sections.section import Identity, Section


class Source(Section):
    """One data set: a URL, a glob or a hub name."""

    path: str = Identity(
        description=(
            "fsspec URL, file, folder or glob of shards (.jsonl, .parquet, .arrow, .csv, .txt; .jsonl and .csv also .gz or "
            ".zst); or a Hugging Face data set (org/name)."
        )
    )
    name: str | None = Identity(
        None, description="What metrics call this source; none: source-0, source-1, ..."
    )
    weight: float | None = Identity(
        None,
        gt=0,
        description=(
            "Share of the sequences drawn from this source, relative to the others'; none: as its size says."
        ),
    )
    repeat: float | None = Identity(
        None,
        gt=0,
        description=(
            "Times this source counts in an epoch (0.5: half of it, 2: twice), in place of weight; none: once."
        ),
    )
    share: float | None = Identity(
        None,
        gt=0,
        lt=1,
        description=(
            "Share of an epoch's sequences that comes from this source, beside those without a share, which come by "
            "repeat: for a replay of older data; none: by weight or repeat."
        ),
    )
    subset: str | None = Identity(
        None, description="Configuration name of a Hugging Face data set; none: default."
    )
    split: str = Identity("train", description="Split of a Hugging Face data set.")


def _as_sources(value: Any) -> Any:
    """Accept one source or many, each as a bare string or a mapping."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str) else item for item in values)


class MixingPhase(Section):
    """Weights of the sources at one step; between two phases they move in a straight line, after the last they stay."""

    until_step: int = Identity(ge=0, description="Step at which the weights are reached.")
    weights: tuple[NonNegativeFloat, ...] = Identity(
        min_length=1, description="One weight a source, in the order of data.train."
    )


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class FieldsSection(Section):
    """Names of the columns samples are read from."""

    messages: str = Identity(
        "messages", description="format chat: column with a list of {role, content}."
    )
    prompt: str = Identity("prompt", description="format instruction: column with the prompt.")
    response: str = Identity(
        "response", description="format instruction: column with the answer to learn."
    )
    system: str | None = Identity(
        None, description="format instruction: column with a system prompt; none: no such."
    )
    text: str = Identity("text", description="format text: column with the text.")


class AugmentSection(Section):
    """Random changes of the words of training texts, anew each epoch (EDA, arXiv:1901.11196)."""

    probability: float = Identity(
        1.0, gt=0, le=1, description="Probability that a text is augmented in an epoch."
    )
    synonyms: str | None = Identity(
        None,
        description=(
            "File or fsspec URL of lines `word<TAB>synonym,synonym`; kept with the run when it begins; none: no such."
        ),
    )
    replace: float = Identity(
        0.0,
        ge=0,
        le=1,
        description=("Probability that a word which has synonyms becomes one of them."),
    )
    swap: float = Identity(
        0.0,
        ge=0,
        le=1,
        description=("Probability that a word changes places with another one of its text."),
    )
    delete: float = Identity(0.0, ge=0, lt=1, description="Probability that a word is left out.")


class DataSection(Section):
    """Which samples are learned from, and how they become sequences."""

    train: Sources = Identity(min_length=1, description="Training data: one source or a list.")
    format: Literal["auto", "chat", "instruction", "text", "tokens"] = Identity(
        "auto",
        description=(
            "What a row is; auto: decided by its columns (input_ids; messages; prompt and response; text)."
        ),
    )
    fields: FieldsSection = Field(default_factory=FieldsSection, description="Column names.")
    prompt_template: str = Identity(
        "{prompt}\n",
        description=(
            "format instruction with a tokenizer that has no chat template: what stands before the answer."
        ),
    )
    system_prompt: str | None = Identity(
        None,
        description=(
            "formats chat and instruction: system prompt of rows that bring none; none: no such."
        ),
    )
    targets: Literal["response", "all"] = Identity(
        "response",
        description=(
            "Which tokens are learned: answers (assistant turns) only, or all. Plain text always learns all."
        ),
    )
    shuffle: bool = Identity(
        True, description="Order samples anew each epoch by run.seed; off: as they lie."
    )
    pack: bool = Identity(
        True,
        description=(
            "Fill sequences with several samples kept apart; off: one sample each, as always where task.name is not "
            "causal_lm."
        ),
    )
    bucket: int | None = Identity(
        None,
        ge=0,
        description=(
            "Not packed: micro-batches hold samples of like length, chosen among so many micro-batches at a time; 0: as "
            "they come; none: 64 (causal_lm: 0)."
        ),
    )
    block_mib: float = Identity(
        16,
        gt=0,
        le=4096,
        description=(
            "MiB of consecutive source data that are read, tokenised, cached and packed together."
        ),
    )
    shuffle_blocks: int = Identity(
        16,
        ge=1,
        description=(
            "Blocks whose sequences are shuffled together, over all lanes; more mixes better and reads more at once."
        ),
    )
    temperature: float | None = Identity(
        None,
        gt=0,
        description=(
            "Several sources: weights are sizes ** (1 / temperature); 1: as they are, more: small ones count more. "
            "None: by weight and repeat."
        ),
    )
    mixing: tuple[MixingPhase, ...] = Identity(
        (),
        description=(
            "Weights that move over the run: phases {until_step, weights}, straight lines between; empty: constant."
        ),
    )
    bad_rows: Literal["error", "skip"] = Identity(
        "error",
        description=(
            "A row that can not be used: stop with an error that names it, or leave it out, counted and reported."
        ),
    )
    max_bad_rows: int = Field(
        100, ge=0, description="bad_rows=skip: more than so many are an error after all."
    )
    overlong: Literal["error", "truncate", "drop", "split"] = Identity(
        "error",
        description=(
            "A sample longer than batch.sequence_length: stop with an error, cut its end off, leave it out, or (plain "
            "text only) go on in a further sequence."
        ),
    )
    augment: AugmentSection = Field(
        default_factory=AugmentSection,
        description=("Training texts with some words changed (tasks with labels and regression)."),
    )
    cache_dir: str | None = Field(
        None,
        description=(
            "Local folder for tokenised blocks and fetched models, shared by a node's workers; none: ~/.cache/dist_ft."
        ),
    )
    cache_gib: float = Field(
        200, gt=0, description="Least recently used tokenised blocks go when there are more GiB."
    )
    tokenizer_processes: int = Field(
        1,
        ge=0,
        description=(
            "Processes a worker lets tokenise beside training; 0: in the worker itself. Little data never needs one."
        ),
    )
    prefetch_steps: int = Field(2, ge=1, description="Steps made ready ahead of training.")
