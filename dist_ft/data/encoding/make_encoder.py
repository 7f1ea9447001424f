"""Choose the encoder of a run."""

from __future__ import annotations

from typing import Any

from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.config.task_facts import task_class
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.encoding.prompt_encoder import PromptEncoder
from dist_ft.data.encoding.task_encoder import TaskEncoder

NO_PROMPT = PromptingSection()


def make_encoder(
    tokenizer: Any,
    data: DataSection,
    task: TaskSection,
    sequence_length: int,
    prompting: PromptingSection = NO_PROMPT,
) -> Encoder:
    """Return the encoder of the rows of `data` for `task`, whose labels must be known."""
    # tasks that continue text read the formats of rows themselves, whatever the prompting method
    if task_class(task.name).reads_formats:
        return Encoder(tokenizer, data)

    if prompting.method == "likelihood":
        return PromptEncoder(tokenizer, data, task, prompting, sequence_length)
    return TaskEncoder(tokenizer, data, task, sequence_length)
