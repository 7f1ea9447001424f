"""DeepSpeed with one worker: the state survives a round trip at every stage and dtype."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ports
import pytest
from unit.small import make_engine, train

CASES = [
    (0, "float32", "adamw"),
    (0, "float32", "sgd"),
    (0, "float32", "adafactor"),
    (1, "float32", "adamw"),
    (1, "bfloat16", "adamw"),
    (2, "float32", "sgd"),
    (2, "bfloat16", "adamw"),
    (3, "float32", "adamw"),
    (3, "bfloat16", "sgd"),
]
PROGRAM = """
import json, logging, os, sys
import torch.distributed as dist
from unit.small import make_model, run_config, train
from dist_ft.config.schema import ModelSection
from dist_ft.engine import deepspeed_engine as sharded, deepspeed_config as ds_config
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.loading.load import load_causal_lm
from dist_ft.core.world import World

dist.init_process_group("gloo")
sharded.attach_to_process_group(False)
logging.disable(logging.WARNING)

def build(stage, dtype, name, dropout, **changes):
    momentum = 0.9 if name == "sgd" else 0.0
    config = run_config("unused", zero={"stage": stage}, cluster={"workers": 1}, model={"dtype": dtype},
                        optimizer={"name": name, "momentum": momentum, "learning_rate": 1e-2})
    settings = ds_config.build_deepspeed_config(config)
    folder = sys.argv[2] + "-".join(["", *changes])
    if not os.path.exists(folder):
        make_model("gpt2", **changes).save_pretrained(folder)
    with sharded.zero_init(settings):
        module = CausalLM(load_causal_lm(ModelSection(path=folder, dtype=dtype, dropout=dropout)))
    return sharded.DeepSpeedEngine(module, config.optimizer, settings, World())

found = {}
for case in json.loads(sys.argv[1]):
    plain = train(build(*case, 0.0), range(3)) if case[1] == "float32" else []
    engine = build(*case, 0.1)
    at_start = sorted({part.key for part in engine.state_slices()})
    train(engine, range(3))
    saved = {(s.name, s.key): s.read().clone() for s in engine.state_slices()}
    step, expected = engine.optimizer_step(), train(engine, range(3, 5))
    other = build(*case, 0.1, initializer_range=0.5)
    whole = {(s.name, s.key): s.numel for s in other.state_slices()} == {where: len(v) for where, v in saved.items()}
    for part in other.state_slices():
        part.write(saved[part.name, part.key])
    other.finish_load(step)
    found["-".join(map(str, case))] = {
        "plain": plain, "at_start": at_start, "step": step, "resumed": other.optimizer_step(), "whole": whole,
        "expected": expected, "actual": train(other, range(3, 5)), "formats": sorted({str(v.dtype) for v in saved.values()})}
with open(sys.argv[2] + ".json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """The results of all cases, from one process."""
    out = tmp_path_factory.mktemp("deepspeed") / "model"
    port = ports.find_free_port()
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "TORCH_EXTENSIONS_DIR": str(out.parent),
    }
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(CASES), str(out)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_state_survives_a_round_trip(found, case):
    got, name = found["-".join(map(str, case))], case[2]
    keys = {
        "adamw": ["exp_avg", "exp_avg_sq", "param"],
        "sgd": ["momentum_buffer", "param"],
        "adafactor": ["col_var", "param", "row_var", "variance"],
    }[name]
    assert got["at_start"] == keys and got["whole"] and got["formats"] == ["torch.float32"]
    assert got["step"] == got["resumed"] == (0 if name == "sgd" else 3)
    assert got["actual"] == got["expected"]


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case[1] == "float32"],
    ids=lambda case: "-".join(map(str, case)),
)
def test_the_losses_equal_those_of_the_plain_engine(found, case):
    momentum = 0.9 if case[2] == "sgd" else 0.0
    expected = train(make_engine("gpt2", name=case[2], momentum=momentum), range(3))
    assert found["-".join(map(str, case))]["plain"] == pytest.approx(expected, rel=1e-5)
