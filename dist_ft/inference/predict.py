"""A model folder applied to rows: labels, tags, answers, numbers, vectors or texts, in the rows' own order.

One process and plain transformers; the folder itself says which task it does. Rows of like length share a batch, order
is restored. Guarantees: a head that was never trained is refused; a file that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_ft.checkpoint import export, initial_weights
from dist_ft.config.load import load_stored_section
from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.config.sections.decoding import MAKERS, DecodingSection, parse, short_form
from dist_ft.config.sections.prompting import PromptingSection, of_model
from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.encoding.answer_spans import find_context
from dist_ft.data.encoding.task_encoder import add_leading_spaces
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.few_shot import Prompted
from dist_ft.metrics.task_scores import softmax
from dist_ft.model import heads
from dist_ft.model.adapters import soft_prompts
from dist_ft.model.loading.download import fetch_model
from dist_ft.model.loading.load import load_task_model, load_tokenizer
from dist_ft.model.task_models import pool_hidden_states
from dist_ft.training.prediction_collector import best_span

log = logging.getLogger("dist_ft.predict")
MOST_TOKENS = 384
"""Of a window of a context."""
KINDS = {
    "SequenceClassification": "sequence_classification",
    "TokenClassification": "token_classification",
    "QuestionAnswering": "question_answering",
    "ConditionalGeneration": "seq2seq",
    "CausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "MaskedLM": "masked_lm",
}
"""Ends of the names of transformers' classes, and the tasks they do."""
PROBLEMS = {"multi_label_classification": "multi_label", "regression": "regression"}


def task_of(config: Any, path: str) -> TaskSection:
    """Return the task the model of a config does, with its labels."""
    name = next(
        (
            task
            for name in config.architectures or ()
            for end, task in KINDS.items()
            if name.endswith(end)
        ),
        "embedding",
    )
    if name == "sequence_classification":
        name = PROBLEMS.get(
            config.problem_type or "", "regression" if config.num_labels == 1 else name
        )
    if name == "masked_lm":
        raise ModelError(
            f"model.path={path}: is a masked language model, which has nothing to say of a text yet; "
            "models with a head, causal models and encoder-decoders are allowed; train one"
        )
    labels = tuple(label for _, label in sorted((config.id2label or {}).items()))
    return TaskSection.model_validate(
        {"name": name, "labels": labels if name in heads.LABELLED else ()}
    )


def version_of(path: str, max_new_tokens: int, strategy: str = "greedy") -> str:
    """Return what changes when the model at `path` does, or what it is asked for."""
    folder = Path(fetch_model(initial_weights.resolve_model_section(ModelSection(path=path)).path))
    asked = parse(strategy, DecodingSection(max_new_tokens=max_new_tokens))
    return json.dumps(
        [
            path,
            max_new_tokens,
            short_form(asked),
            asked.seed,
            *sorted(
                (item.name, item.stat().st_size, item.stat().st_mtime_ns)
                for item in folder.glob("*.safetensors")
            ),
        ]
    )


def _task(
    path: str, folder: str, about: dict[str, Any], prompting: PromptingSection
) -> TaskSection:
    """Return what the model in a folder does, by its config and by what an export says besides."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={path}: is no model folder ({str(error).splitlines()[0][:100]}); what "
            "`dist-ft export` writes is needed; export the run first"
        ) from error
    if prompting.method == "likelihood":
        return load_stored_section(about, "task", TaskSection, path)
    task = task_of(config, path)
    if "task" not in about:
        return task
    return load_stored_section(about, "task", TaskSection, path).model_copy(
        update={"labels": task.labels, "new_head": False, "grow_head": False}
    )


def _attention(trained_with: str, device: str) -> str:
    """Return the attention to compute with: flash attention has kernels for GPUs only."""
    if device == "cpu" and "flash" in trained_with:
        log.warning(
            "model.attention=%s: needs a GPU; sdpa is used here, which computes the same",
            trained_with,
        )
        return "sdpa"
    return trained_with


def _model(task: TaskSection, section: ModelSection, tokenizer: Any, path: str) -> Any:
    """Return the model, ready to be asked; one whose head was never trained is refused."""
    model, new = load_task_model(task, section)
    if new:
        raise ModelError(
            f"model.path={path}: {len(new)} weights of its head are not in the files, such as "
            f"{min(new)}; what it says would be random; train it first"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval()


class Predictor:
    """A model folder that is asked."""

    def __init__(
        self, path: str, batch: int = 32, max_new_tokens: int = 128, strategy: str = "greedy"
    ) -> None:
        """Load the folder (URL, hub name) at `path`.

        Args:
            path: of the model.
            batch: rows at once.
            max_new_tokens: longest text to make, in tokens.
            strategy: how texts are made (`config.decoding.parse`); draws follow from the number of the row.

        Raises:
            ModelError: there is no such model, or weights of its head are missing.
            ConfigError: there is no such strategy.
        """
        import torch

        self._decoding = parse(strategy, DecodingSection(max_new_tokens=max_new_tokens, batch_size=batch))
        self._batch = batch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = fetch_model(initial_weights.resolve_model_section(ModelSection(path=path)).path)
        self.version = version_of(path, max_new_tokens, strategy)
        told = Path(folder) / export.INFO_FILE
        about = json.loads(told.read_text("utf-8")) if told.exists() else {}
        self._template = str(about.get("prompt_template", "{prompt}\n"))
        prompting = load_stored_section(about, "prompting", PromptingSection, str(told))
        self.task = _task(path, folder, about, prompting)
        section = ModelSection.model_validate(
            {
                "path": folder,
                "dtype": "bfloat16" if device == "cuda" else "float32",
                "attention": _attention(about.get("attention", "sdpa"), device),
            }
        )
        self.tokenizer = load_tokenizer(section)
        self.model: Any = _model(of_model(self.task, prompting), section, self.tokenizer, path).to(
            device
        )
        self._virtual = soft_prompts.find_virtual_tokens(self.model)
        longest = heads.longest_input(self.model.config)
        self._length = min(longest or 10**6, self.tokenizer.model_max_length, 10**6)
        self._prompted = (
            Prompted(
                self.model,
                self.tokenizer,
                self.task,
                prompting,
                min(self._length, about.get("sequence_length") or self._length),
            )
            if prompting.method == "likelihood"
            else None
        )

    def predict(self, rows: Sequence[Row], first: int = 0) -> list[dict[str, Any]]:
        """Return what the model says of each row, in their order; `first`: number of the first of them in all."""
        import torch

        if self.task.name in MAKERS:
            return self._made(rows, first)
        read = getattr(self, f"_{self.task.name}")
        order = np.argsort([-len(str(row)) for row in rows], kind="stable")
        found: list[dict[str, Any]] = [{}] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(rows), self._batch):
                places = order[start : start + self._batch].tolist()
                for place, value in zip(
                    places, read([rows[place] for place in places]), strict=True
                ):
                    found[place] = value
        return found

    def _inputs(self, *texts: list[Any], **options: Any) -> Any:
        options = {"padding_side": "right", **options}
        return self.tokenizer(
            *texts,
            padding=True,
            truncation=True,
            max_length=self._length,
            return_tensors="pt",
            **options,
        )

    def _own(self, values: Any) -> Any:
        """Return what is said of each token, without the virtual ones in front."""
        return values[:, len(self._virtual.ids) :] if self._virtual is not None else values

    def _told(self, encoded: Any) -> Any:
        return self.model(
            **soft_prompts.prepend_virtual_tokens(
                self._virtual,
                {name: value.to(self.model.device) for name, value in encoded.items()},
            )
        )

    def _texts(self, rows: Sequence[Row]) -> list[list[str]]:
        """Return the texts, and the second ones if rows have them."""
        columns = self.task.columns
        pair = columns.pair or ("pair" if all("pair" in row for row in rows) else None)
        return [
            [_text(row, name) for row in rows] for name in (columns.text, pair) if name is not None
        ]

    def _sequence_classification(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        texts = self._texts(rows)
        if self._prompted is not None:
            shares = softmax(self._prompted.scores(*texts))
        else:
            shares = softmax(self._told(self._inputs(*texts)).logits.float().cpu().numpy())
        for row in shares:
            yield {
                "label": self.task.labels[int(row.argmax())],
                "score": round(float(row.max()), 6),
            }

    def _multi_label(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        logits = self._told(self._inputs(*self._texts(rows))).logits.float().cpu().numpy()
        for row in logits:
            yield {
                "label": [
                    label for label, value in zip(self.task.labels, row, strict=True) if value > 0
                ]
            }

    def _regression(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        for value in (
            self._told(self._inputs(*self._texts(rows))).logits[:, 0].float().cpu().tolist()
        ):
            yield {"label": value}

    def _token_classification(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        words = [row["tokens"] if "tokens" in row else _text(row, "text").split() for row in rows]
        given = add_leading_spaces(words, self.tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        encoded = self._inputs(given, is_split_into_words=True)
        logits = self._own(self._told(encoded).logits).float().cpu().numpy()
        for number, own in enumerate(words):
            tags = ["O" if "O" in self.task.labels else self.task.labels[0]] * len(own)
            places = encoded.word_ids(number)
            for at in reversed(
                range(len(places))
            ):  # the first token of a word decides, as in training
                if places[at] is not None:
                    tags[places[at]] = self.task.labels[int(logits[number, at].argmax())]
            yield {"tokens": own, "tags": tags}

    def _question_answering(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        questions, contexts = (
            [_text(row, name) for row in rows] for name in ("question", "context")
        )
        length = min(MOST_TOKENS, self._length)
        encoded = self.tokenizer(
            questions,
            contexts,
            padding=True,
            truncation="only_second",
            stride=length // 4,
            max_length=length,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        owners, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
        told = self._told(encoded)
        logits = np.stack(
            [
                self._own(found).float().cpu().numpy()
                for found in (told.start_logits, told.end_logits)
            ],
            -1,
        )
        best = [(-np.inf, "")] * len(rows)
        for window, owner in enumerate(owners.tolist()):
            begin, tail = find_context(encoded.sequence_ids(window))
            first, last, score = best_span(logits[window], begin, logits.shape[1] - tail)
            start, stop = int(offsets[window, first, 0]), int(offsets[window, last, 1])
            answer = contexts[owner][start:stop] if last else ""
            best[owner] = max(best[owner], (score, answer), key=lambda found: found[0])
        for score, answer in best:
            yield {"answer": answer, "score": round(float(score), 4)}

    def _embedding(self, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
        encoded = self._inputs([_text(row, self.task.columns.text) for row in rows])
        hidden = self._own(self._told(encoded).last_hidden_state).float().cpu()
        vectors = pool_hidden_states(hidden, encoded["attention_mask"], self.task.pooling)
        for vector in (vectors / vectors.norm(dim=1, keepdim=True)).tolist():
            yield {"embedding": vector}

    def _made(self, rows: Sequence[Row], first: int) -> list[dict[str, Any]]:
        """Return the texts made of rows."""
        from dist_ft.model.generation import GenerationRequest, TextGenerator

        decoder, name = (
            TextGenerator(self._decoding, self.tokenizer),
            "text" if self.task.name == "seq2seq" else "response",
        )
        asked = [
            GenerationRequest(np.array(ids), first + number) for number, ids in enumerate(self._asked(rows))
        ]
        made = [
            [decoder.decode_text(ids) for ids in texts] for texts in decoder.generate_all(self.model, asked)
        ]
        return [{name: texts[0], **({"others": texts[1:]} if texts[1:] else {})} for texts in made]

    def _asked(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return what stands before the texts to make, as tokens."""
        if self.task.name == "seq2seq":
            sources = [_text(row, "source" if "source" in row else "text") for row in rows]
            return list(
                self.tokenizer(sources, truncation=True, max_length=self._length)["input_ids"]
            )
        asked = [_text(row, "prompt" if "prompt" in row else "text") for row in rows]
        templated = bool(self.tokenizer.chat_template)
        if not templated:
            asked = [self._template.replace("{prompt}", prompt) for prompt in asked]
        else:
            asked = [
                str(
                    self.tokenizer.apply_chat_template(
                        [{"role": "user", "content": prompt}],
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                )
                for prompt in asked
            ]
        self.tokenizer.truncation_side = "left"  # what begins the answer stays
        room = max(1, self._length - self._decoding.max_new_tokens)
        return list(
            self.tokenizer(
                asked, truncation=True, max_length=room, add_special_tokens=not templated
            )["input_ids"]
        )


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(
            f"a row has no text in '{name}' (it has {', '.join(map(str, row)) or 'nothing'}); rename its "
            "column, or remove it"
        )
    return value
