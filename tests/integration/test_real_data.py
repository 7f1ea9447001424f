"""Real data sets and a small real model: read over S3, masks as they must be, and a loss that falls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import history
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import ranks
import s3
import tiny

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.data.tools.write import encode_parquet
from dist_ft.runs import ledger_audit
from dist_ft.storage.filesystem import Store

pytest.importorskip("s3fs", reason="needs s3fs (the extra `s3`)")
pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
Shared = Callable[[str], Path]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3.server() as found:
        yield found


@pytest.fixture
def url(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The bucket's URL, for this process."""
    for name, value in s3.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    s3.reset_options(options(port))
    yield f"s3://{s3.BUCKET}"
    s3.reset_options({})


def options(port: int) -> dict[str, Any]:
    return {"s3": {"endpoint_url": f"http://127.0.0.1:{port}"}}


def rows_of(shared: Shared, name: str) -> list[dict[str, Any]]:
    """Return the rows of a data set as they are trained on."""
    if name == "wikitext2":
        lines = shared("data/wikitext2/valid.txt").read_text().split("\n")
        return [{"text": line.strip()} for line in lines if len(line) > 40]
    path = {"self_instruct": "seed_tasks.jsonl"}.get(name, "train.jsonl")
    rows = [json.loads(line) for line in shared(f"data/{name}/{path}").read_text().splitlines()]
    if name == "self_instruct":
        return [
            {"prompt": f"{row['instruction']}\n{one['input']}".strip(), "response": one["output"]}
            for row in rows
            for one in row["instances"]
            if one["output"].strip()
        ]
    return [{"messages": row["messages"]} for row in rows] if name == "sgd_chat" else rows


def upload(shared: Shared, url: str, name: str, suffix: str) -> str:
    """Write a set into the bucket as shards of a kind and return their folder."""
    rows, folder = rows_of(shared, name), f"{url}/{suffix}/{name}"
    for shard in range(3):
        part = rows[shard::3]
        if suffix == "parquet":
            sink = pa.BufferOutputStream()
            pyarrow.parquet.write_table(pa.Table.from_pylist(part), sink, row_group_size=100)
            Store(folder).write(f"{shard}.parquet", sink.getvalue().to_pybytes())
        else:
            body = "".join(json.dumps(row) + "\n" for row in part).encode()
            Store(folder).write(f"{shard}.jsonl", body)
    return f"{folder}/"


def document(
    shared: Shared, tmp_path: Path, port: int, url: str, train: Any, steps: int, **data: Any
) -> Any:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    return load_config(
        {
            "run": {"name": "real", "storage": f"{url}/runs/{tmp_path.name}", "seed": 3},
            "model": {
                "path": str(shared("models/stories260k")),
                "dtype": "float32",
                "chat_template": str(template),
            },
            "data": {
                "train": train,
                "overlong": "truncate",
                "cache_dir": str(tmp_path / "cache"),
                "block_mib": 0.1,
                **data,
            },
            "batch": {"global_batch": 8, "micro_batch": 4, "sequence_length": 128},
            "optimizer": {"learning_rate": 2e-3},
            "schedule": {"steps": steps, "warmup_ratio": 0.1},
            "checkpoint": {"every_steps": 0},
            "storage": {"options": options(port)},
        }
    )


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("self_instruct", "jsonl"),
        ("sgd_chat", "parquet"),
        *(
            pytest.param(name, suffix, marks=pytest.mark.slow)
            for name, suffix in [
                ("self_instruct", "parquet"),
                ("sgd_chat", "jsonl"),
                ("gsm8k", "jsonl"),
                ("gsm8k", "parquet"),
                ("wikitext2", "jsonl"),
                ("wikitext2", "parquet"),
            ]
        ),
    ],
)
def test_loss_falls_on_each_data_set(
    shared: Shared, tmp_path: Path, port: int, url: str, name: str, suffix: str
) -> None:
    fields = {"fields": {"prompt": "question", "response": "answer"}} if name == "gsm8k" else {}
    run = document(shared, tmp_path, port, url, upload(shared, url, name, suffix), 40, **fields)
    result = api.train(run, skip_check=True)
    losses = history.losses(run.run_url)
    assert result.step == 40 and np.mean(losses[-10:]) < 0.85 * np.mean(losses[:5])


def test_all_data_sets_mixed_for_a_few_hundred_steps(
    shared: Shared, tmp_path: Path, port: int, url: str
) -> None:
    names = ["sgd_chat", "self_instruct", "wikitext2"]
    train = [
        {"path": upload(shared, url, name, suffix), "name": name, "weight": weight}
        for name, suffix, weight in zip(
            names, ["jsonl", "parquet", "jsonl"], [3, 1, 2], strict=True
        )
    ]
    run = document(shared, tmp_path, port, url, train, 300)
    api.train(run, skip_check=True)
    losses = history.losses(run.run_url)
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    lines = [json.loads(line) for line in Store(run.run_url).read("metrics.jsonl").splitlines()]
    shares = {
        name: sum(line[f"sequences/{name}"] for line in lines if line["kind"] == "train") / 2400
        for name in names
    }
    assert shares == pytest.approx(
        {"sgd_chat": 1 / 2, "self_instruct": 1 / 6, "wikitext2": 1 / 3}, abs=0.02
    )
    found = ledger_audit.audit(run.run_url)
    assert found.is_sound and {count.source for count in found.epochs} == set(names)


def test_target_mask_of_a_long_dialogue_is_golden(
    shared: Shared, tmp_path: Path, port: int, url: str
) -> None:
    """Targets of the first dialogue are the assistant's words and their end tokens, nothing else."""
    (first, *_) = rows_of(shared, "sgd_chat")
    first["messages"] = first["messages"][:8]
    Store(f"{url}/golden").write("a.jsonl", json.dumps(first).encode())
    run = document(shared, tmp_path, port, url, f"{url}/golden/", 1)
    text = api.preview(
        run.model_copy(update={"batch": run.batch.model_copy(update={"sequence_length": 512})}), 1
    )
    body = text.split("\n", 1)[1].split("\n\nsamples ")[0]
    expected = "".join(
        f"assistant: [[{m['content']}</s>]]\n"
        if m["role"] == "assistant"
        else f"user: {m['content']}</s>\n"
        for m in first["messages"]
    )
    assert len(first["messages"]) == 8 and expected.count("[[") == 4
    assert "".join(body.split()) == "".join(expected.split())
    assert "[[What city do you want to dine in? Do you have a preferred restaurant?</s>]]" in body


def test_promise_1_a_run_on_s3_killed_twice_resumes_in_other_worlds(
    tmp_path: Path, port: int, url: str
) -> None:
    """Two workers under ZeRO-3, three under ZeRO-1, one without DeepSpeed: data and run in the bucket, mixed, packed."""
    tiny.make_model(tmp_path / "model")
    rows = tiny.rows(90)
    Store(f"{url}/once").write(
        "lines/a.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:60]).encode()
    )
    Store(f"{url}/once").write("table/a.parquet", encode_parquet(rows[60:]))

    def run(workers: int, stage: int) -> dict[str, Any]:
        return tiny.config(
            tmp_path,
            "once",
            workers=workers,
            stage=stage,
            storage={"options": options(port)},
            run={"storage": f"{url}/runs"},
            data={
                "train": [
                    {"path": f"{url}/once/lines/", "name": "lines"},
                    {"path": f"{url}/once/table/", "name": "table", "repeat": 2},
                ]
            },
        )

    for number, (workers, stage, dies_at) in enumerate([(2, 3, 7), (3, 1, 15)]):
        codes = ranks.run_ranks(
            workers,
            [run(workers, stage)],
            tmp_path / f"ranks-{number}",
            env={"DIST_FT_FAILPOINT": f"train.step:{dies_at - 4 * number}"},
        )
        assert set(codes) == {-9}, (tmp_path / f"ranks-{number}" / "rank-0.log").read_text()[-2000:]
    api.train(load_config(run(0, 0)), skip_check=True)
    history.require_exactly_once(f"{url}/runs/once", run(0, 0))
    found = ledger_audit.audit(f"{url}/runs/once")
    assert found.is_sound and found.attempts == 3
    assert [(c.source, c.num_segments) for c in found.epochs] == [("lines", 60)] * 2 + [
        ("table", 30)
    ] * 4
