"""Create a tiny run for trying a cluster, without any download: python launch/tiny_run.py

Writes `runs/tiny.yaml` and, in `runs/tiny-material`, a Llama of a million parameters with random
weights, a tokenizer trained on the spot, and docstrings of this Python as data. It trains for a
minute or two on two CPUs and is of no use afterwards.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import quickstart_data

FOLDER, CONFIG = Path("runs/tiny-material"), Path("runs/tiny.yaml")
ROWS, VOCABULARY = 2000, 2000
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
RUN = """# Written by launch/tiny_run.py.
run: {name: tiny, storage: ./runs}
model: {path: ./runs/tiny-material/model, dtype: float32}
data: {train: ./runs/tiny-material/train.jsonl, format: instruction, overlong: truncate}
batch: {global_batch: 8, micro_batch: 4, sequence_length: 128}
optimizer: {learning_rate: 1.0e-3}
schedule: {steps: 600, warmup_steps: 5}
zero: {stage: 3}
cluster: {workers: 2, cpus_per_worker: 0.5}
checkpoint: {every_steps: 200}
"""


def write_model(texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(FOLDER / "model")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    model.save_pretrained(FOLDER / "model")


def main() -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    rows = quickstart_data.pairs()[0][:ROWS]
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_model([text for row in rows for text in row.values()])
    (FOLDER / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    CONFIG.write_text(RUN, "utf-8")
    print(f"wrote {CONFIG}; next: dist-ft check {CONFIG}")


if __name__ == "__main__":
    main()
