"""Applies a model folder to rows: labels, tags, answers, numbers, vectors or generated text.

One process and plain transformers; the folder itself says which task it does. Rows of similar
length share a batch, and the order is restored. Guarantee: a head that was never trained is
refused.

Shapes: B rows of a batch, T tokens, K labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dist_ft.config.sections.decoding import GENERATIVE_TASKS
from dist_ft.core.errors import DataError
from dist_ft.data.encoding.answer_spans import find_context
from dist_ft.data.encoding.task_encoder import add_leading_spaces
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.few_shot import PromptedClassifier
from dist_ft.inference.model_folder import (
    DEFAULT_OPTIONS,
    PredictionOptions,
    load_folder,
    model_version,
)
from dist_ft.metrics.task_scores import softmax
from dist_ft.model import heads
from dist_ft.model.adapters import soft_prompts
from dist_ft.model.task_models import pool_hidden_states
from dist_ft.training.predictions import best_span

MAX_WINDOW_TOKENS = 384
"""Tokens of a window of a context."""
NO_LIMIT = 10**6


class Predictor:
    """A model folder that predicts.

    Attributes:
        task: what the model does, with labels.
        tokenizer, model: of the folder.
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
        self.task = loaded.task
        self.tokenizer = loaded.tokenizer
        self.model = loaded.model
        self._prompt_template = str(loaded.info.get("prompt_template", "{prompt}\n"))
        self._virtual_tokens = soft_prompts.find_virtual_tokens(self.model)

        longest = heads.longest_input(self.model.config)
        self._max_tokens = min(longest or NO_LIMIT, self.tokenizer.model_max_length, NO_LIMIT)
        self._prompted: PromptedClassifier | None = None
        if loaded.prompting.method == "likelihood":
            max_tokens = min(self._max_tokens, loaded.info.get("sequence_length") or NO_LIMIT)
            self._prompted = PromptedClassifier(
                self.model, self.tokenizer, self.task, loaded.prompting, max_tokens
            )

    def predict(self, rows: Sequence[Row], start: int = 0) -> list[dict[str, Any]]:
        """Return the prediction for each row, in their order, as JSON values.

        `start`: number of the first row.

        The keys depend on the task: label and score, tokens and tags, answer and score, embedding,
            text, or response.
        """
        import torch

        if self.task.name in GENERATIVE_TASKS:
            return self._generate(rows, start)

        predict_batch = getattr(self, f"_{self.task.name}")
        by_length = np.argsort([-len(str(row)) for row in rows], kind="stable")
        predictions: list[dict[str, Any]] = [{}] * len(rows)
        with torch.inference_mode():
            for first in range(0, len(rows), self._batch_size):
                numbers = by_length[first : first + self._batch_size].tolist()
                batch = predict_batch([rows[number] for number in numbers])
                for number, prediction in zip(numbers, batch, strict=True):
                    predictions[number] = prediction
        return predictions

    def _encode(self, *texts: list[Any], **options: Any) -> Any:
        """Return token ids and mask (B, T), padded and truncated."""
        options = {"padding_side": "right", **options}
        return self.tokenizer(
            *texts,
            padding=True,
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
            **options,
        )

    def _forward(self, encoded: Any) -> Any:
        """Return the outputs of the model, virtual tokens in front."""
        inputs = {name: value.to(self.model.device) for name, value in encoded.items()}
        return self.model(**soft_prompts.prepend_virtual_tokens(self._virtual_tokens, inputs))

    def _without_virtual(self, values: Any) -> Any:
        """Return outputs per token (B, T, ...) without those of the virtual tokens in front."""
        if self._virtual_tokens is None:
            return values
        return values[:, len(self._virtual_tokens.ids) :]

    def _logits(self, rows: Sequence[Row]) -> np.ndarray:
        """Return the logits (B, K) of a head on whole texts."""
        outputs = self._forward(self._encode(*self._texts(rows)))
        return outputs.logits.float().cpu().numpy()

    def _texts(self, rows: Sequence[Row]) -> list[list[str]]:
        """Return the texts, and the second texts if rows have them."""
        columns = self.task.columns
        pair = columns.pair or ("pair" if all("pair" in row for row in rows) else None)
        names = [columns.text] if pair is None else [columns.text, pair]
        return [[_text(row, name) for row in rows] for name in names]

    def _sequence_classification(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        if self._prompted is not None:
            scores = self._prompted.scores(*self._texts(rows))
        else:
            scores = self._logits(rows)
        for row in softmax(scores):
            label = self.task.labels[int(row.argmax())]
            yield {"label": label, "score": round(float(row.max()), 6)}

    def _multi_label(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        for row in self._logits(rows):
            labels = zip(self.task.labels, row, strict=True)
            yield {"label": [label for label, logit in labels if logit > 0]}

    def _regression(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        for value in self._logits(rows)[:, 0].tolist():
            yield {"label": value}

    def _token_classification(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        words = [row["tokens"] if "tokens" in row else _text(row, "text").split() for row in rows]
        spaced = add_leading_spaces(words, self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        encoded = self._encode(spaced, is_split_into_words=True)
        outputs = self._forward(encoded)
        logits = self._without_virtual(outputs.logits).float().cpu().numpy()  # (B, T, K)
        default = "O" if "O" in self.task.labels else self.task.labels[0]
        for number, row_words in enumerate(words):
            tags = [default] * len(row_words)
            word_of_token = encoded.word_ids(number)
            # backwards, so that the first token of a word decides, as in training
            for token in reversed(range(len(word_of_token))):
                word = word_of_token[token]
                if word is not None:
                    tags[word] = self.task.labels[int(logits[number, token].argmax())]
            yield {"tokens": row_words, "tags": tags}

    def _question_answering(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        questions = [_text(row, "question") for row in rows]
        contexts = [_text(row, "context") for row in rows]
        window_tokens = min(MAX_WINDOW_TOKENS, self._max_tokens)
        # a long context becomes several overlapping windows
        encoded = self.tokenizer(
            questions,
            contexts,
            padding=True,
            truncation="only_second",
            stride=window_tokens // 4,
            max_length=window_tokens,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        row_of_window = encoded.pop("overflow_to_sample_mapping").tolist()
        offsets = encoded.pop("offset_mapping")
        outputs = self._forward(encoded)
        ends = [
            self._without_virtual(logits).float().cpu().numpy()
            for logits in (outputs.start_logits, outputs.end_logits)
        ]
        logits = np.stack(ends, -1)  # (windows, T, 2)

        best_scores, answers = [-np.inf] * len(rows), [""] * len(rows)
        for window, row in enumerate(row_of_window):
            start, tail = find_context(encoded.sequence_ids(window))
            first, last, score = best_span(logits[window], start, logits.shape[1] - tail)
            if score > best_scores[row]:
                best_scores[row] = score
                span = slice(int(offsets[window, first, 0]), int(offsets[window, last, 1]))
                answers[row] = contexts[row][span] if last else ""
        for answer, score in zip(answers, best_scores, strict=True):
            yield {"answer": answer, "score": round(float(score), 4)}

    def _embedding(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        encoded = self._encode([_text(row, self.task.columns.text) for row in rows])
        outputs = self._forward(encoded)
        hidden = self._without_virtual(outputs.last_hidden_state).float().cpu()  # (B, T, H)
        vectors = pool_hidden_states(hidden, encoded["attention_mask"], self.task.pooling)
        for vector in (vectors / vectors.norm(dim=1, keepdim=True)).tolist():
            yield {"embedding": vector}

    def _generate(self, rows: Sequence[Row], start: int) -> list[dict[str, Any]]:
        """Return the generated text of each row; further samples of one row are its `others`."""
        from dist_ft.model.generation import GenerationRequest, TextGenerator

        generator = TextGenerator(self._decoding, self.tokenizer)
        column = "text" if self.task.name == "seq2seq" else "response"
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
        if self.task.name == "seq2seq":
            sources = [_text(row, "source" if "source" in row else "text") for row in rows]
            encoded = self.tokenizer(sources, truncation=True, max_length=self._max_tokens)
            return list(encoded["input_ids"])

        prompts = [_text(row, "prompt" if "prompt" in row else "text") for row in rows]
        has_chat_template = bool(self.tokenizer.chat_template)
        if has_chat_template:
            prompts = [self._chat_prompt(prompt) for prompt in prompts]
        else:
            prompts = [self._prompt_template.replace("{prompt}", prompt) for prompt in prompts]
        self.tokenizer.truncation_side = "left"  # keeps what comes right before the answer
        encoded = self.tokenizer(
            prompts,
            truncation=True,
            max_length=max(1, self._max_tokens - self._decoding.max_new_tokens),
            add_special_tokens=not has_chat_template,
        )
        return list(encoded["input_ids"])

    def _chat_prompt(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        columns = ", ".join(map(str, row)) or "no columns"
        raise DataError(
            f"a row has no text in '{name}' (it has {columns}). A text is needed. Rename its "
            "column, or remove the row."
        )
    return value
