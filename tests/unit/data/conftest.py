"""A small real tokenizer with a ChatML template, so that most tests need no shared files."""

from __future__ import annotations

import pytest
from unit.data.data_helpers import batch_section, data_section

from dist_ft.config.schema import Source
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index_builder import build_index, split_into_blocks
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.tools.write import write_jsonl
from dist_ft.storage.filesystem import Store

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "hello there, how are you today?",
    "system user assistant",
    "    indented = code(1)\n    more = 2\n",
    "Was ist das? Größe: 42 äöü",
]


@pytest.fixture(scope="session")
def _base_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(_base_tokenizer):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_base_tokenizer), eos_token="<|im_end|>"
    )
    fast_tokenizer.chat_template = CHATML
    return fast_tokenizer


@pytest.fixture
def plain_tokenizer(tokenizer):
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture
def make(tmp_path, tokenizer):
    """Return a function that stores rows in shards of `rows_per_shard` rows.

    It returns the shards of each source and the block store over them.
    """

    def make(rows, rows_per_shard=7, tok=None, cache="cache", **values):
        data = data_section(**{"block_mib": 0.0005, **values})
        store = Store(str(tmp_path / "shards"))
        write_jsonl(rows, store, "train", rows_per_shard)
        shards = discover_shards([Source(path=store.url)])
        blocks = split_into_blocks(shards, data, World(), Collectives())
        encoder = Encoder(tok or tokenizer, data)
        return shards, BlockStore(tmp_path / cache, encoder, shards[0], blocks)

    return make


@pytest.fixture
def make_loader(make):
    """Return a function that stores rows and returns a loader over them."""

    def make_loader(rows, batch=None, seed=0, **values):
        shards, blocks = make(rows, **values)
        batch = batch or batch_section(sequence_length=128)
        data = blocks.encoder.data
        index = build_index(shards, blocks, data, batch.sequence_length, World(), Collectives())
        plan = BatchPlan(index.counts, index.sources, data, batch, seed)
        return Loader(plan, index, blocks)

    return make_loader
