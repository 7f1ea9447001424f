"""Answer one prompt with a model folder, by plain transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dist_ft.checkpoint import initial_weights
from dist_ft.config.schema import ModelSection
from dist_ft.config.sections.decoding import DecodingSection
from dist_ft.model.generation import GenerationRequest, TextGenerator
from dist_ft.model.loading.load import load_causal_lm, load_tokenizer


def answer(model: str, prompt: str, system: str | None, decoding: DecodingSection) -> list[str]:
    """Return the model's answers to a prompt: as many as `decoding.num_samples`.

    Args:
        model: folder, URL or hub name.
        prompt: the prompt, as a user turn if the model has a chat template.
        system: system prompt.
        decoding: strategy and maximum length.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    files = initial_weights.resolve_model_section(
        ModelSection(path=model, dtype="bfloat16" if on_gpu else "float32")
    )
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
        text = f"{system}\n{prompt}" if system else prompt
        return tokenizer(text)["input_ids"]

    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": prompt})
    text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return tokenizer(text, add_special_tokens=False)["input_ids"]
