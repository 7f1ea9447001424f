"""Few-shot entity recognition: a causal model generates the entities of each row, in this process.

`data.encoding.entity_text` parses the generated text into BIO tags; the metrics are those of a
trained tagger.

Dimensions: B rows of a batch, P tokens of the longest prompt, G generated tokens, T words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any
from uuid import uuid4

import numpy as np

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import Source
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.world import World, collectives
from dist_ft.data.encoding import entity_text, prompt_templates, task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, RowLocation, discover_shards
from dist_ft.inference.model_under_test import ModelScores
from dist_ft.metrics import task_scores
from dist_ft.model.heads import longest_input
from dist_ft.runtime.bootstrap.few_shot_examples import draw_examples
from dist_ft.runtime.bootstrap.labels import resolve_labels
from dist_ft.storage.filesystem import Store
from dist_ft.tasks.base import make_task

HEADER = "Find the entities in each text. Kinds: {kinds}.\n\n"
TEMPLATE = "Text: {text}\nEntities:"
"""The prompt without prompting.templates: one header, then this template for each text."""


class EntityGenerator:
    """A causal model that generates entities; a `ModelUnderTest`.

    Attributes:
        run: the run with labels, and templates that contain the examples.
        head: always "generation".
    """

    head = "generation"

    def __init__(self, run: ResolvedRun) -> None:
        """Load the labels, the examples and the model.

        Raises:
            ConfigError: the labels are not BIO tags, or no prompt fits.
        """
        from dist_ft.model.loading.load import load_task_model, load_tokenizer

        # Labels that are found in the data are stored with a run; here, in memory only.
        config, world = run.config, World()
        store = Store(f"memory://evaluate-{uuid4().hex}")
        run = resolve_labels(run, store, world, collectives(world))
        labels = run.labels
        if "O" not in labels or not task_rows.is_bio(labels):
            raise ConfigError(
                [
                    f"task.labels: {', '.join(labels[:6])} are not BIO tags. "
                    "prompting.method=generation needs O, and B- and I- for each entity type. "
                    "Correct the data."
                ],
                "evaluate",
            )

        self._type_names: dict[str, str] = {}  # {entity type: its name in prompts}
        for entity_type in entity_text.entity_types(labels):
            default_name = entity_type.replace("_", " ")
            name = config.prompting.verbalizers.get(entity_type, default_name)
            self._type_names[entity_type] = name

        self._label_ids = {label: label_id for label_id, label in enumerate(labels)}
        self.run = replace(run, templates=self._build_templates(run))
        self._template = self.run.prompting.templates[0]

        # Some causal models have no padding token, such as GPT-2. Which one pads makes no
        # difference, because the attention mask hides it.
        self._tokenizer = load_tokenizer(run.model, config.data.cache_dir)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

        model, _ = load_task_model(run.model_task, run.model, config.data.cache_dir)
        self._model: Any = model.eval()
        self._max_prompt_tokens = self._compute_max_prompt_tokens()
        if config.cluster.gpus_per_worker:
            self._model.to("cuda")

    def use_template(self, template: str) -> None:
        """Use `template`, one of the run's templates, for all further prompts."""
        self._template = template

    def score(self, sources: Sequence[Source]) -> ModelScores:
        """Return the scores on the rows of `sources`.

        The metric `readable` is the fraction of answers that could be parsed.
        """
        samples = self._read_samples(sources)
        expected, predicted = [], []
        num_readable = 0
        outside_id = self._label_ids["O"]
        batch_size = self.run.config.batch.micro_batch
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            for sample, answer in zip(batch, self._generate(batch), strict=True):
                tags, is_readable = entity_text.parse_entities(
                    answer, sample.first, self._type_names
                )
                num_readable += is_readable

                # The labels may hold B- without I- of a type, or the other way around: a tag that
                # is no label counts as O.
                tag_ids = [self._label_ids.get(tag, outside_id) for tag in tags]
                expected.append(_as_array(sample.label))
                predicted.append(_as_array(tag_ids))

        # `Task.decide` takes (tags, probabilities), as a tagger gives them; an answer has none.
        predictions = [(tags, np.ones(len(tags))) for tags in predicted]
        metrics: dict[str, Any] = {}
        if samples:
            scores = task_scores.token_classification(self.run.task.labels, expected, predicted)
            metrics = {**scores.values, **scores.tables}

        metrics["readable"] = num_readable / max(1, len(samples))
        return ModelScores(metrics, expected, predictions)

    def _generate(self, samples: Sequence[Sample]) -> list[str]:
        """Return the generated text of each row, up to the end of its first line."""
        import torch

        prompts = []
        for sample in samples:
            text = " ".join(sample.first)
            prompts.append(prompt_templates.fill_template(self._template, text))

        # Truncated on the left, which cuts examples: the row comes last. Padded on the left, so
        # that the answer of every row follows its prompt directly.
        self._tokenizer.truncation_side = "left"
        encoded = self._tokenizer(
            prompts,
            padding=True,
            padding_side="left",
            truncation=True,
            max_length=self._max_prompt_tokens,
            return_tensors="pt",
        )

        # Some tokenizers return token types too, which causal models do not take.
        encoded.pop("token_type_ids", None)
        with torch.inference_mode():
            generated = self._model.generate(
                **encoded.to(self._model.device),
                max_new_tokens=self.run.config.prompting.max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id,
                tokenizer=self._tokenizer,
                stop_strings=["\n"],
            )  # (B, P + G)

        answers = generated[:, encoded["input_ids"].shape[1] :]  # (B, G)
        return self._tokenizer.batch_decode(answers, skip_special_tokens=True)

    def _compute_max_prompt_tokens(self) -> int:
        """Return the maximum number of prompt tokens that leaves space for the answer.

        Raises:
            ConfigError: no token is left for a prompt.
        """
        # A model without a limit of its own has None here.
        config = self.run.config
        limits = [longest_input(self._model.config), config.batch.sequence_length]
        max_length = min(length for length in limits if length)
        limit = max_length - config.prompting.max_new_tokens
        if limit < 1:
            raise ConfigError(
                [
                    f"prompting.max_new_tokens={config.prompting.max_new_tokens}: leaves no "
                    f"tokens for a prompt, as an input has at most {max_length} tokens (the "
                    "smaller of batch.sequence_length and the model's longest input). Use at most "
                    f"{max_length - 1}."
                ],
                "evaluate",
            )

        return limit

    def _read_samples(self, sources: Sequence[Source]) -> list[Sample]:
        """Return the rows of `sources`, at most the first evaluation.max_samples."""
        config, task = self.run.config, make_task(self.run.task)
        samples: list[Sample] = []
        located_rows = _iterate_rows(sources, config.data.max_row_bytes)
        for location, row in islice(located_rows, config.evaluation.max_samples or None):
            # A row that cannot be decoded is an error like one that lacks a column.
            try:
                if isinstance(row, DataError):
                    raise row
                samples.append(task.read(row, location))
            except DataError:
                if config.data.bad_rows == "error":
                    raise

        return samples

    def _build_templates(self, run: ResolvedRun) -> tuple[str, ...]:
        """Return the run's templates, each after prompting.shots examples with their answers."""
        section = run.config.prompting
        header = ""
        if not section.templates:
            header = HEADER.format(kinds=", ".join(self._type_names.values()))

        samples: list[Sample] = []
        if section.shots:
            samples = draw_examples(run, section.shots)

        templates = []
        for template in section.templates or (TEMPLATE,):
            examples = []
            for sample in samples:
                prompt = prompt_templates.fill_template(template, " ".join(sample.first))
                tags = [run.labels[label_id] for label_id in sample.label]
                answer = entity_text.format_entities(sample.first, tags, self._type_names)
                examples.append(f"{prompt} {answer}")

            # The header goes through `prepend_examples` only for its braces: the result is filled
            # as a template once more, for each row.
            escaped_header = prompt_templates.prepend_examples("", [header], "")
            with_examples = prompt_templates.prepend_examples(template, examples, section.separator)
            templates.append(escaped_header + with_examples)

        return tuple(templates)


def _iterate_rows(
    sources: Sequence[Source], max_row_bytes: int
) -> Iterator[tuple[RowLocation, Row | DataError]]:
    """Yield each row of `sources` with its location; rows that cannot be decoded as errors."""
    for shards in discover_shards(list(sources), "evaluation.data"):
        for shard in shards:
            rows = readers.iter_rows(shard, max_row_bytes=max_row_bytes)
            for row_number, row in enumerate(rows, 1):
                yield RowLocation(shard.url, row_number), row


def _as_array(label_ids: Sequence[int]) -> Any:
    """Return the label ids of a row's words as an int64 array (T,)."""
    return np.asarray(label_ids, dtype=np.int64)
