"""Answer one prompt with a model folder, by plain transformers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from dist_ft.checkpoint import initial_weights
from dist_ft.config.schema import ModelSection
from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.core.errors import ModelError
from dist_ft.model.generation import GenerationRequest, TextGenerator
from dist_ft.model.loading.load import load_causal_lm, load_tokenizer
from dist_ft.pretrained import chat_templates, tokenizing


def answer(model: str, prompt: str, system: str | None, decoding: DecodingSection) -> list[str]:
    """Return the model's answers to a prompt: as many as `decoding.num_samples`.

    Args:
        model: folder, URL or hub name.
        prompt: the prompt, as a user turn if the model has a chat template.
        system: system prompt.
        decoding: strategy and maximum length.
    """
    from transformers.utils import logging as transformers_logging

    # The answer is the only output of the command.
    transformers_logging.disable_progress_bar()

    # On many CPUs, products of bfloat16 are far slower than those of float32.
    on_gpu = torch.cuda.is_available()
    dtype: Literal["float32", "bfloat16"] = "float32"
    if on_gpu:
        dtype = "bfloat16"

    # The path may name a run; its latest checkpoint is then exported first.
    files = initial_weights.resolve_model_section(ModelSection(path=model, dtype=dtype))
    tokenizer = load_tokenizer(files)
    network = load_causal_lm(files).eval()
    if on_gpu:
        network.cuda()

    request = GenerationRequest(np.array(_encode_prompt(tokenizer, prompt, system)))
    generator = TextGenerator(decoding, tokenizer)
    (generations,) = generator.generate_all(network, [request])
    return [generator.decode_text(ids) for ids in generations]


def _encode_prompt(tokenizer: Any, prompt: str, system: str | None) -> list[int]:
    """Return the token ids of a prompt, through the chat template if there is one."""
    if not tokenizer.chat_template:
        text = prompt
        if system:
            text = f"{system}\n{prompt}"
        return _tokenize(tokenizer, text, add_special_tokens=True)

    turns = []
    if system:
        turns.append({"role": "system", "content": system})
    turns.append({"role": "user", "content": prompt})

    # The template writes the special tokens itself; the tokenizer would add a second start token.
    try:
        text = chat_templates.render(tokenizer, turns, add_generation_prompt=True)
    except chat_templates.TemplateError as error:
        raise ModelError(
            f"--prompt: the chat template of the model refuses it ({error}). Only what the "
            "template supports is allowed. Use another model, or correct its template."
        ) from error
    return _tokenize(tokenizer, text, add_special_tokens=False)


def _tokenize(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """Return the token ids of the prompt, at least one."""
    try:
        with tokenizing.tokenizing_errors():
            ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    except tokenizing.UntokenizableError as error:
        raise ModelError(f"--prompt: {tokenizing.describe(error)}.") from error
    if not ids:
        raise ModelError("--prompt: gives no token. Text is needed. Write a longer prompt.")
    return ids
