"""Writes a small project to try dist_ft with: a model, data and a commented config, no network.

The data are questions about the capitals of countries. A Llama of half a million random weights
answers them after seconds of training on two CPU cores.
"""

from __future__ import annotations

import random
from pathlib import Path

from dist_ft.core.errors import ConfigError
from dist_ft.data.tools.write import write_jsonl
from dist_ft.selftest.materials import ModelSize, write_model
from dist_ft.storage.filesystem import Store

CONFIG_FILE = "run.yaml"
CAPITALS = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Brazil": "Brasilia",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Mexico": "Mexico City",
    "Nigeria": "Abuja",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Turkey": "Ankara",
    "Vietnam": "Hanoi",
}
QUESTIONS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "The capital of {}, please?",
    "Do you know the capital of {}?",
)
HELD_OUT_QUESTION = "Tell me the capital of {}."
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SIZE = ModelSize(128, 2, 384, 4, 256)

TEMPLATE = """\
# A complete run on a model and data that were made on the spot. Commands to try, in this order:
#   dist-ft check {folder}/run.yaml        everything that is wrong with the run, all at once
#   dist-ft preview {folder}/run.yaml      which tokens are targets
#   dist-ft train {folder}/run.yaml        train; the same command resumes an interrupted run
#   dist-ft export {folder}/run.yaml --out {folder}/trained
#   dist-ft generate {folder}/trained --prompt "What is the capital of Peru?"
#
# Your own data: ... run.name=mine data.train=my.jsonl evaluation.data=my-held-out.jsonl
# Two workers on Ray with DeepSpeed ZeRO-3: ... run.name=two cluster.workers=2 zero.stage=3

run:
  name: tiny                  # the same name under the same storage is the same run
  storage: {folder}/runs      # a folder, or a bucket: s3://, gs://, az://
  seed: 0                     # of the order of the data, dropout and new weights

model:
  path: {folder}/model        # a folder, a URL or the name of a hub model
  dtype: float32              # on GPUs: bfloat16

data:
  train: {folder}/data/train*.jsonl   # JSON Lines, Parquet, CSV, text; local, in a bucket, on a hub
  format: instruction         # columns prompt and response; also chat and text
  overlong: truncate          # rows longer than batch.sequence_length; also error, drop, split

batch:
  global_batch: 16            # sequences per optimizer step, over all workers
  micro_batch: 4              # sequences per forward pass
  sequence_length: 64         # tokens; short samples share a sequence

optimizer:
  name: adamw
  learning_rate: 2.0e-3       # high, as all weights are random; 1e-5 to 5e-5 fine-tune a real model

schedule:
  name: cosine
  epochs: 40
  warmup_ratio: 0.05

evaluation:
  data: {folder}/data/held-out*.jsonl   # questions that are phrased in another way
  every_steps: 40

checkpoint:
  every_steps: 40             # or auto: by the cost of a save
  keep_last: 2

log:
  every_steps: 10

cluster:
  workers: 0                  # 0: this process; 1 or more: Ray workers, also a range such as 2..8
"""


def write_tiny_project(folder: str) -> Path:
    """Write model, data and config into a new folder; return the path of the config.

    Raises:
        ConfigError: the folder exists and is not empty.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            [
                f"{folder}: exists and is not empty. A new or an empty folder is needed. Name "
                "another."
            ],
            "init",
        )

    store = Store(str(path))
    train, held_out = _rows(QUESTIONS), _rows((HELD_OUT_QUESTION,))
    texts = [f"{row['prompt']} {row['response']}" for row in (*train, *held_out)]
    write_model(store, "model", SIZE, texts, CHAT_TEMPLATE)
    write_jsonl(train, store, "data/train", len(train) // 2)
    write_jsonl(held_out, store, "data/held-out", len(held_out))

    config = path / CONFIG_FILE
    store.write(CONFIG_FILE, TEMPLATE.format(folder=path.as_posix()).encode())
    return config


def _rows(questions: tuple[str, ...]) -> list[dict[str, str]]:
    """Return each question about each country, in an order that mixes them."""
    rows = []
    for question in questions:
        for country, capital in CAPITALS.items():
            rows.append({"prompt": question.format(country), "response": capital})
    random.Random(0).shuffle(rows)
    return rows
