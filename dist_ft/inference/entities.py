"""Entities without training: a causal model is shown examples and writes down what it finds, greedily.

In this process. What it writes is read by `data.entities`; the scores are those of a trained tagger.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any
from uuid import uuid4

from dist_ft.config.schema import RunConfig, Source
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.world import World, collectives
from dist_ft.data.encoding import entity_text, prompt_templates, task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.inference.model_under_test import Told
from dist_ft.metrics.task_scores import TaskScores, token_classification
from dist_ft.model.heads import longest_input
from dist_ft.runtime.bootstrap.few_shot_examples import (
    examples,
)
from dist_ft.runtime.bootstrap.labels import with_labels
from dist_ft.storage.filesystem import Store

HEADER = "Find the entities in each text. Kinds: {kinds}.\n\n"
TEMPLATE = "Text: {text}\nEntities:"


class Written:
    """A model that writes entities, its weights loaded once; asked as `asking.Asked` is.

    Attributes:
        config: with labels and examples.
        kind: generation.
    """

    kind = "generation"

    def __init__(self, config: RunConfig, random_head: bool = False) -> None:
        """Load the model; a causal model has no head that could be random."""
        from dist_ft.model.loading.load import load_task_model, load_tokenizer

        world = World()
        config = with_labels(
            config, Store(f"memory://evaluate-{uuid4().hex}"), world, collectives(world)
        )
        labels = config.task.labels
        kinds = entity_text.entity_kinds(labels)
        if "O" not in labels or not task_rows.is_bio(labels):
            raise ConfigError(
                [
                    f"task.labels: {', '.join(labels[:6])} are no BIO tags; prompting.method=generation "
                    "needs O, B- and I- of each kind; correct the data"
                ],
                "evaluate",
            )
        self._names = {
            kind: config.prompting.verbalizers.get(kind, kind.replace("_", " ")) for kind in kinds
        }
        self._ids = {label: number for number, label in enumerate(labels)}
        self.config = self._with_examples(config)
        self._template = self.config.prompting.templates[0]
        self.tokenizer = load_tokenizer(config.model, config.data.cache_dir)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model: Any = load_task_model(config.model_task, config.model, config.data.cache_dir)[0].eval()
        limits = [longest_input(self.model.config), config.batch.sequence_length]
        self._room = min(length for length in limits if length) - config.prompting.max_new_tokens
        if self._room < 1:
            raise ConfigError(
                [
                    f"prompting.max_new_tokens={config.prompting.max_new_tokens}: leaves no room for a "
                    f"prompt in batch.sequence_length={config.batch.sequence_length}; fewer are allowed; "
                    "lower it, or raise the length"
                ],
                "evaluate",
            )
        if config.cluster.gpus_per_worker:
            self.model.to("cuda")

    def by_template(self, template: str) -> None:
        """Ask by another template from now on."""
        self._template = template

    def about(self, sources: Sequence[Source]) -> Told:
        """Return what the model finds in the rows of `sources`."""
        samples = self._samples(sources)
        wanted, told, readable = [], [], 0
        for start in range(0, len(samples), self.config.batch.micro_batch):
            some = samples[start : start + self.config.batch.micro_batch]
            for sample, answer in zip(some, self._answers(some), strict=True):
                tags, understood = entity_text.parse_entities(answer, sample.first, self._names)
                readable += understood
                wanted.append(_numbers(sample.label))
                told.append(_numbers([self._ids.get(tag, self._ids["O"]) for tag in tags]))
        scores = (
            token_classification(self.config.task, wanted, told) if samples else TaskScores({})
        )
        values = scores.values | scores.tables
        return Told({**values, "readable": readable / max(1, len(samples))}, wanted, told)

    def _answers(self, samples: Sequence[Sample]) -> list[str]:
        """Return what the model writes for each row, up to the end of its first line."""
        import torch

        most = self.config.prompting.max_new_tokens
        prompts_of = [
            prompt_templates.fill_template(self._template, " ".join(sample.first)) for sample in samples
        ]
        self.tokenizer.truncation_side = "left"  # the row itself stays
        encoded = self.tokenizer(
            prompts_of,
            padding=True,
            padding_side="left",
            truncation=True,
            max_length=self._room,
            return_tensors="pt",
        )
        encoded.pop("token_type_ids", None)
        with torch.inference_mode():
            made = self.model.generate(
                **encoded.to(self.model.device),
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                tokenizer=self.tokenizer,
                stop_strings=["\n"],
            )
        return self.tokenizer.batch_decode(
            made[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def _samples(self, sources: Sequence[Source]) -> list[Sample]:
        """Return the rows of `sources`, the first evaluation.max_samples of them."""
        found = []
        shards = [shard for source in discover_shards(list(sources), "evaluation.data") for shard in source]
        rows = (
            (shard.url, number, row)
            for shard in shards
            for number, row in enumerate(readers.iter_rows(shard), 1)
        )
        for url, number, row in islice(rows, self.config.evaluation.max_samples or None):
            try:
                if isinstance(row, DataError):
                    raise row
                found.append(
                    task_rows.read_token_classification(row, self.config.task, self._ids, url, number)
                )
            except DataError:
                if self.config.data.bad_rows == "error":
                    raise
        return found

    def _with_examples(self, config: RunConfig) -> RunConfig:
        """Return the config whose templates show prompting.shots answered examples."""
        section, labels = config.prompting, config.task.labels
        header = "" if section.templates else HEADER.format(kinds=", ".join(self._names.values()))
        drawn = examples(config, section.shots) if section.shots else []
        made = []
        for template in section.templates or (TEMPLATE,):
            shown = [
                prompt_templates.fill_template(template, " ".join(one.first))
                + " "
                + entity_text.format_entities(one.first, [labels[tag] for tag in one.label], self._names)
                for one in drawn
            ]
            made.append(
                prompt_templates.prepend_examples("", [header], "")
                + prompt_templates.prepend_examples(template, shown, section.separator)
            )
        return config.model_copy(
            update={"prompting": section.model_copy(update={"templates": tuple(made)})}
        )


def _numbers(tags: Sequence[int]) -> Any:
    import numpy as np

    return np.asarray(tags, dtype=np.int64)
