"""The section `model`: the model to train, and how it computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dist_ft.config.sections.section import Identity, Section


class ModelSection(Section):
    """The model to train, and how it computes."""

    # Part of the identity is what the weights start from and how text becomes tokens.
    path: str = Identity(
        description=(
            "Model folder, fsspec URL of one, or hub name (org/name; gated ones read HF_TOKEN from "
            "the environment); or the folder of a run (<run.storage>/<run.name>), to start from "
            "its trained model."
        )
    )
    checkpoint: Literal["latest", "best"] = Identity(
        "latest",
        description=(
            "path is the folder of a run: start from its latest checkpoint, or from its best by "
            "its checkpoint.best_by."
        ),
    )
    revision: str | None = Identity(
        None, description="Hub branch, tag or commit; default: the default branch."
    )
    tokenizer: str | None = Identity(
        None, description="Folder, URL or hub name of the tokenizer; default: `path`."
    )
    chat_template: str | None = Identity(
        None, description="File with a Jinja chat template; default: that of the tokenizer."
    )
    # From here on: how the model computes. A resume on other hardware may change it; checkpoints
    # hold the trained weights in float32 in any case.
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description=(
            "Data type of weights and activations in the forward and backward pass. Master weights "
            "and optimizer state are float32."
        ),
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = Field(
        "sdpa", description="Attention implementation."
    )
    activation_checkpointing: bool = Field(
        False,
        description=(
            "Recompute layer activations in the backward pass: less memory, about a third more "
            "compute."
        ),
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Probability of all dropouts of the model; default: as in the model's config.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run Python code that comes with the model; off: such models are refused.",
    )


def _flash_attention_needs_bfloat16(model: ModelSection) -> Iterator[str]:
    if model.attention.startswith("flash") and model.dtype != "bfloat16":
        yield (
            f"model.attention={model.attention}: flash attention computes in 16 bits only. Needs "
            f"model.dtype=bfloat16 (now {model.dtype}). Set that, or model.attention=sdpa."
        )


CHECKS = (_flash_attention_needs_bfloat16,)
