"""Held-out samples in packed batches, and text that several workers generate, each once."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import tiny
import tiny_tasks
from resolved import resolve
from unit.model.test_generation import decoder
from unit.small import make_model

from dist_ft.config.load import load_config
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.world import Collectives, World
from dist_ft.model.generation import GenerationRequest
from dist_ft.runtime import local
from dist_ft.runtime.bootstrap.build_data import Loaders, build_loaders
from dist_ft.storage.filesystem import Store
from dist_ft.training.held_out_generation import (
    HeldOutGenerator,
    generate_distributed,
    iterate_samples,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base(tiny.base(tmp_path_factory.mktemp("texts"), samples=12))


def held_out(base: Path, **changes):
    config = load_config(
        tiny.config(base, "x", evaluation={"data": str(base / "data" / "*.jsonl")}, **changes)
    )
    return resolved(config)


def resolved(config) -> tuple[ResolvedRun, Loaders]:
    store = Store(f"memory://{uuid4().hex}")
    run = resolve(config, store)
    return run, build_loaders(run, store, World(), Collectives())


@pytest.mark.parametrize("pack", [True, False])
def test_prompts_and_targets_are_found_in_packed_rows(base, pack):
    run, data = held_out(base, data={"pack": pack}, batch={"micro_batch": 5})
    loader = data.evaluation
    batches = [
        batch for step in range(loader.steps_per_epoch) for batch in loader.batches(step, range(1))
    ]
    assert not pack or any(len(batch.segments) > len(batch.input_ids) for batch in batches), (
        "some rows hold several samples"
    )
    samples = sorted(
        (one for batch in batches for one in iterate_samples(batch, False)),
        key=lambda one: one.sample,
    )
    rows = [
        json.loads(line)
        for file in sorted((base / "data").glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    tokenizer = run.tokenizer
    assert [tokenizer.decode(one.prompt) for one in samples] == [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False
        )
        for row in rows
    ]
    assert [tokenizer.decode(one.target) for one in samples] == [
        row["response"] + "<|end|>" for row in rows
    ]
    data.close()


def test_target_of_a_chat_is_its_first_answer(base, tmp_path):
    turns = [
        {"role": role, "content": word}
        for role, word in (
            ("user", "the fox"),
            ("assistant", "jumps"),
            ("user", "bread and tea"),
            ("assistant", "news of towns"),
        )
    ]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    run, data = held_out(base, data={"train": str(tmp_path / "chat.jsonl"), "format": "auto"})
    (one,) = iterate_samples(data.training.batches(0, range(1))[0], False)
    assert run.tokenizer.decode(one.prompt) == "<|user|>the fox<|end|><|assistant|>"
    assert run.tokenizer.decode(one.target) == "jumps<|end|>"
    data.close()


class Threads(Collectives):
    """Collectives of workers that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.values, self.barrier = size, {}, threading.Barrier(size, timeout=30)

    def all_gather(self, value):
        self.values[threading.current_thread().name] = value
        self.barrier.wait()
        gathered = [self.values[name] for name in sorted(self.values)]
        self.barrier.wait()
        return gathered


class OneModel:
    """An engine that can only generate; it counts the calls of `generate`."""

    def __init__(self, synced: bool) -> None:
        self.model, self.synced, self.calls = make_model("gpt2").eval(), synced, 0
        generate = self.model.generate

        def counted(**given):
            assert given.pop("synced_gpus") == synced
            self.calls += 1
            return generate(**given)

        self.model.generate = counted

    @contextlib.contextmanager
    def generation_mode(self):
        yield self.model, self.synced


@pytest.mark.parametrize("synced", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_each_text_is_generated_once_and_calls_are_equal_where_required(size, synced):
    rng = np.random.default_rng(0)
    rows = [
        GenerationRequest(rng.integers(3, 90, length), number)
        for number, length in enumerate((4, 9, 1, 2, 7, 7, 3))
    ]
    sampling = {"strategy": "sample", "num_samples": 2}
    expected = decoder(7, **sampling).generate_all(make_model("gpt2").eval(), rows)
    results, engines, collectives = {}, [OneModel(synced) for _ in range(size)], Threads(size)

    def work(rank):
        results[rank] = generate_distributed(
            decoder(2, **sampling), engines[rank], rows, World(rank, size, rank, size), collectives
        )

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[rank] for rank in range(size)] == [expected] * size
    calls = [engine.calls for engine in engines]  # four batches of at most two rows
    assert calls == ([2, 2] if size == 2 else [2, 2, 2] if synced else [2, 1, 1])


def test_first_samples_are_taken_once_whichever_worker_has_them(base):
    config = load_config(
        tiny.config(
            base,
            "x",
            evaluation={
                "data": str(base / "data" / "*.jsonl"),
                "generate_samples": 5,
                "decoding": {"max_new_tokens": 3},
            },
        )
    )
    run, data = resolved(config)
    generator = HeldOutGenerator.from_config(config, run.tokenizer)
    for _ in range(2):  # a second evaluation starts over
        for batch in data.evaluation.batches(0, range(5)) + data.evaluation.batches(1, range(5)):
            generator.collect(batch)
        assert [one.sample for one in generator.take_samples(Collectives())] == [0, 1, 2, 3, 4]
    assert HeldOutGenerator.from_config(load_config(tiny.config(base, "x")), run.tokenizer) is None
    data.close()


def test_run_stops_early_by_a_metric_of_generated_text(base):
    """The learning rate is so low that no evaluation is better than the first."""
    document = tiny_tasks.config(
        base,
        "seq2seq",
        "early",
        optimizer={"learning_rate": 1e-12},
        checkpoint={"best_by": "token_error_rate"},
    )
    document["evaluation"].update(
        {
            "every_steps": 1,
            "patience": 2,
            "generate_samples": 3,
            "text_metrics": "token_error_rate",
            "keep_generations": 2,
            "decoding": {"max_new_tokens": 4},
        }
    )
    result = local.run(load_config(document))
    assert result.step == 2
    store = Store(str(base / "runs" / "seq2seq-early"))
    stored = json.loads(store.read("evaluations/step-000000002.json"))
    assert [set(one) for one in stored["generations"]] == [
        {"sample", "prompt", "reference", "text"}
    ] * 2
    lines = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
    assert (
        stored["token_error_rate"]
        == [line for line in lines if line["kind"] == "evaluation"][-1]["token_error_rate"]
    )
