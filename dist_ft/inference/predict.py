"""Applies a model folder to rows: labels, tags, answers, numbers, vectors or generated text.

One process and plain transformers; the folder itself says which task it does. Rows of similar
length share a batch, and the order is restored. Guarantee: a head that was never trained is
refused.

Shapes: B rows of a batch, T tokens, K labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_ft.core.errors import DataError, DistFtError, ModelError
from dist_ft.core.native_errors import is_panic
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.few_shot import PromptedClassifier
from dist_ft.inference.model_folder import (
    DEFAULT_OPTIONS,
    PredictionOptions,
    load_folder,
    model_version,
)
from dist_ft.model import heads
from dist_ft.model.adapters import soft_prompts
from dist_ft.pretrained import chat_templates, tokenizing
from dist_ft.tasks.base import make_task
from dist_ft.tasks.inference_rows import read_inference_text

NO_LIMIT = 10**6


class Predictor:
    """A model folder that predicts.

    Attributes:
        task: what the model does, with labels.
        tokenizer, model: of the folder.
        max_tokens: most tokens of an input.
        version: changes when the weights, or the options that affect predictions, do.
    """

    def __init__(self, path: str, options: PredictionOptions = DEFAULT_OPTIONS) -> None:
        """Load the model at `path` (folder, URL, hub name).

        Raises:
            ModelError: the model does not exist, or weights of the head are missing.
            ConfigError: the decoding strategy does not exist.
        """
        import torch

        self._decoding = options.decoding()
        self._batch_size = options.batch_size
        loaded = load_folder(path, "cuda" if torch.cuda.is_available() else "cpu")
        self.version = model_version(path, options)
        self.task = make_task(loaded.task)
        self.tokenizer = loaded.tokenizer
        self.model = loaded.model
        self._prompt_template = str(loaded.info.get("prompt_template", "{prompt}\n"))
        self._virtual_tokens = soft_prompts.find_virtual_tokens(self.model)

        longest = heads.longest_input(self.model.config)
        self.max_tokens = min(longest or NO_LIMIT, self.tokenizer.model_max_length, NO_LIMIT)
        self._prompted: PromptedClassifier | None = None
        if loaded.prompting.method == "likelihood":
            max_tokens = min(self.max_tokens, loaded.info.get("sequence_length") or NO_LIMIT)
            self._prompted = PromptedClassifier(
                self.model, self.tokenizer, loaded.task, loaded.prompting, max_tokens
            )

    def predict(self, rows: Sequence[Row], start: int = 0) -> list[dict[str, Any]]:
        """Return the prediction for each row, in their order, as JSON values.

        `start`: number of the first row.

        The keys depend on the task: label and score, tokens and tags, answer and score, embedding,
            text, or response.
        """
        try:
            return self._predict(rows, start)
        except (DistFtError, MemoryError):
            raise
        except BaseException as error:
            # A text that the tokenizer cannot take is the usual cause; then the row is named.
            if isinstance(error, Exception) or is_panic(error):
                self._check_texts(rows, start)
            raise

    def _check_texts(self, rows: Sequence[Row], start: int) -> None:
        """Raise DataError for the first row that the tokenizer cannot take."""
        for number, row in enumerate(rows, start + 1):
            error = tokenizing.find_error(self.tokenizer, row)
            if error is not None:
                raise DataError(f"row {number}: {tokenizing.describe(error)}.")

    def _predict(self, rows: Sequence[Row], start: int) -> list[dict[str, Any]]:
        """See `predict`."""
        import torch

        if self.task.generates_text:
            return self._generate(rows, start)

        by_length = np.argsort([-len(str(row)) for row in rows], kind="stable")
        predictions: list[dict[str, Any]] = [{}] * len(rows)
        with torch.inference_mode():
            for first in range(0, len(rows), self._batch_size):
                numbers = by_length[first : first + self._batch_size].tolist()
                batch = self.task.predict(self, [rows[number] for number in numbers])
                for number, prediction in zip(numbers, batch, strict=True):
                    predictions[number] = prediction
        return predictions

    def encode(self, *texts: list[Any], **options: Any) -> Any:
        """Return token ids and mask (B, T) of texts or pairs, padded and truncated."""
        options = {"padding_side": "right", **options}
        return self.tokenizer(
            *texts,
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            **options,
        )

    def forward(self, encoded: Any) -> Any:
        """Return the outputs of the model, virtual tokens in front."""
        inputs = {name: value.to(self.model.device) for name, value in encoded.items()}
        return self.model(**soft_prompts.prepend_virtual_tokens(self._virtual_tokens, inputs))

    def without_virtual(self, values: Any) -> Any:
        """Return values per token (B, T, ...) without those of the virtual tokens in front."""
        if self._virtual_tokens is None:
            return values
        return values[:, len(self._virtual_tokens.ids) :]

    def logits(self, *texts: list[str]) -> np.ndarray:
        """Return the logits (B, K) of a head on texts, or on pairs of them."""
        outputs = self.forward(self.encode(*texts))
        return outputs.logits.float().cpu().numpy()  # type: ignore[no-any-return]

    def label_scores(self, *texts: list[str]) -> np.ndarray:
        """Return the scores (B, K) of labels: of the head, or of their words where it prompts."""
        if self._prompted is not None:
            return self._prompted.scores(*texts)
        return self.logits(*texts)

    def _generate(self, rows: Sequence[Row], start: int) -> list[dict[str, Any]]:
        """Return the generated text of each row; further samples of one row are its `others`."""
        from dist_ft.model.generation import GenerationRequest, TextGenerator

        generator = TextGenerator(self._decoding, self.tokenizer)
        column = "text" if self.model.config.is_encoder_decoder else "response"
        requests = [
            GenerationRequest(np.array(ids), start + number)
            for number, ids in enumerate(self._prompt_ids(rows))
        ]
        predictions = []
        for samples in generator.generate_all(self.model, requests):
            texts = [generator.decode_text(ids) for ids in samples]
            prediction: dict[str, Any] = {column: texts[0]}
            if texts[1:]:
                prediction["others"] = texts[1:]
            predictions.append(prediction)
        return predictions

    def _prompt_ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the tokens that generated text continues, or that an encoder reads."""
        if self.model.config.is_encoder_decoder:
            sources = self._input_texts(rows, "source")
            encoded = self.tokenizer(sources, truncation=True, max_length=self.max_tokens)
            return list(encoded["input_ids"])

        prompts = self._input_texts(rows, "prompt")
        has_chat_template = bool(self.tokenizer.chat_template)
        if has_chat_template:
            prompts = [self._chat_prompt(prompt) for prompt in prompts]
        else:
            prompts = [self._prompt_template.replace("{prompt}", prompt) for prompt in prompts]
        self.tokenizer.truncation_side = "left"  # keeps what comes right before the answer
        encoded = self.tokenizer(
            prompts,
            truncation=True,
            max_length=max(1, self.max_tokens - self._decoding.max_new_tokens),
            add_special_tokens=not has_chat_template,
        )
        return list(encoded["input_ids"])

    def _input_texts(self, rows: Sequence[Row], column: str) -> list[str]:
        """Return the texts in `column`, or in `text` where a row has no such column."""
        return [read_inference_text(row, column if column in row else "text") for row in rows]

    def _chat_prompt(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        try:
            return chat_templates.render(self.tokenizer, messages, add_generation_prompt=True)
        except chat_templates.TemplateError as error:
            raise ModelError(
                f"the chat template of the model refuses a prompt ({error}). Only what the "
                "template supports is allowed. Use another model, or correct its template."
            ) from error
