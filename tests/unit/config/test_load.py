"""Loading a config: values, overrides, and the exact text of all error messages."""

from __future__ import annotations

import pickle

import pytest
import yaml

from dist_ft.config.load import inspect_config, load_config, resolved_yaml, to_mapping
from dist_ft.config.schema import RunConfig, WorkerRange
from dist_ft.core.errors import ConfigError

BASE = {
    "run": {"name": "x"},
    "model": {"path": "m"},
    "data": {"train": "a.jsonl"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 3},
}


def problems(document, *overrides):
    """Return the problems that `load_config` finds in a mapping or file."""
    with pytest.raises(ConfigError) as caught:
        load_config(document, overrides)
    return list(caught.value.problems)


def with_(*overrides):
    return load_config(BASE, overrides)


def refused(*overrides):
    return problems(BASE, *overrides)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


# --- valid configs


@pytest.mark.parametrize("name", ["quickstart", "single", "llama-8b", "llama-70b"])
def test_complete_files_load(root, name):
    config = load_config(root / "configs" / f"{name}.yaml")
    assert config.run.name == name
    assert load_config(to_mapping(config)) == config


def test_all_yaml_files_in_configs_are_tested_above(root):
    assert {path.stem for path in (root / "configs").glob("*.yaml")} == {
        "quickstart",
        "single",
        "llama-8b",
        "llama-70b",
    }


def test_a_written_config_loads_equal():
    config = with_(
        "cluster.workers=1..4",
        "checkpoint.every_steps=2",
        "zero.deepspeed.aio.block_size=4",
        "data.train=[a, {path: b, split: test}]",
        "storage.options.s3.endpoint_url=http://127.0.0.1:5000",
    )
    assert load_config(to_mapping(config)) == config
    assert load_config(yaml.safe_load(resolved_yaml(config))) == config
    assert RunConfig.model_validate(to_mapping(config)) == config
    assert resolved_yaml(config).startswith(
        "run:\n  name: x\n  storage: ./runs\n  seed: 0\n  max_hours: null\n  max_cost: null\nmodel:\n"
    )
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_file_with_exponents_and_comments(file):
    path = file(
        "run: {name: x}\nmodel: {path: m}\ndata:\n  train: [a, b] # two\n"
        "batch: {global_batch: 4, sequence_length: 8}\nschedule: {steps: 1e1}\n"
        "optimizer: {learning_rate: 1e-5, eps: 1E-6}\n"
    )
    config = load_config(path)
    assert (config.optimizer.learning_rate, config.optimizer.eps, config.schedule.steps) == (
        1e-5,
        1e-6,
        10,
    )
    assert [source.path for source in config.data.train] == ["a", "b"]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("data.fields.prompt=question", "data.fields.prompt", "question"),
        ("run.name=2024", "run.name", "2024"),
        ("model.revision=12e4567", "model.revision", "12e4567"),
        ("model.revision=null", "model.revision", None),
        ("model.revision=", "model.revision", None),
        ("data.prompt_template={prompt}\n", "data.prompt_template", "{prompt}\n"),
        ('data.prompt_template="Q: {prompt}\\n"', "data.prompt_template", "Q: {prompt}\n"),
        ("data.prompt_template=Q: {prompt} = ", "data.prompt_template", "Q: {prompt} = "),
        ("cluster.workers=2..4", "cluster.workers", WorkerRange(min=2, max=4)),
        ("cluster.workers=[2, 4]", "cluster.workers", WorkerRange(min=2, max=4)),
        ("cluster.workers=3", "cluster.workers", 3),
        ("zero.deepspeed.aio.thread_count=2", "zero.deepspeed", {"aio": {"thread_count": 2}}),
        (
            "zero.deepspeed={wall_clock_breakdown: true}",
            "zero.deepspeed",
            {"wall_clock_breakdown": True},
        ),
        ("log.tensorboard=off", "log.tensorboard", False),
    ],
)
def test_overrides(override, path, value):
    found = with_(override, "checkpoint.every_steps=1")
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_do_not_change_the_mapping_and_the_last_one_wins():
    assert with_("schedule.steps=5", "schedule.steps=6").schedule.steps == 6
    assert BASE["schedule"] == {"steps": 3}


def test_an_override_can_add_a_section_and_repair_a_file():
    assert (
        load_config({**BASE, "schedule": {"steps": "many"}}, ["schedule.steps=4"]).schedule.steps
        == 4
    )


# --- invalid files


def test_no_such_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config("absent.yaml")
    assert (
        str(caught.value)
        == f"absent.yaml: 1 problem\n  - no such file (looked in {tmp_path}). Check the path."
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "- a\n- b\n",
            "is a list, not a mapping. A config has `section:` lines with indented `field: value` "
            "lines below. See configs/ for complete ones.",
        ),
        (
            "hello",
            "is a single value, not a mapping. A config has `section:` lines with indented "
            "`field: value` lines below. See configs/ for complete ones.",
        ),
        (
            "run:\n  name: [x\n",
            "line 3: not valid YAML: expected ',' or ']', but got '<stream end>'. A config has "
            "`section:` lines with indented `field: value` lines below. Correct it.",
        ),
        (
            "run: !!python/object:os.system {}",
            "line 1: not valid YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'. A config has `section:` lines with "
            "indented `field: value` lines below. Correct it.",
        ),
    ],
)
def test_files_that_are_not_a_config(file, text, line):
    assert problems(file(text)) == [line]


def test_a_folder_and_a_binary_file(tmp_path):
    assert problems(tmp_path) == ["is a folder. Give the YAML file in it."]
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert problems(tmp_path / "b.yaml") == ["not a text file (UTF-8). Give a YAML file."]


def test_an_empty_file_lacks_all_required_fields(file):
    assert problems(file("")) == [
        "run.name: missing. Needed: lower-case letters, digits and '-', at most 47, with a letter "
        "or digit at both ends (Name of the run). Add it, or pass run.name=<value>.",
        "model.path: missing. Needed: a text (Model folder, fsspec URL of one, or hub name). Add "
        "it, or pass model.path=<value>.",
        "data.train: missing. Needed: a path, or a list of paths or of mappings with path, subset "
        "and split; at least one (Training data). Add it, or pass data.train=<value>.",
        "batch.global_batch: missing. Needed: a whole number of at least 1 (Sequences per "
        "optimizer step, over all workers). Add it, or pass batch.global_batch=<value>.",
        "batch.sequence_length: missing. Needed: a whole number of at least 8 (Tokens per "
        "sequence). Add it, or pass batch.sequence_length=<value>.",
        "schedule.steps: neither steps nor epochs is set. One of them is needed as the length of "
        "the run. Set schedule.steps or schedule.epochs.",
    ]


def test_a_config_at_a_url():
    from dist_ft.storage.filesystem import Store

    Store("memory://configs").write("run.yaml", resolved_yaml(load_config(BASE)).encode())
    assert load_config("memory://configs/run.yaml") == load_config(BASE)
    assert "memory://configs/none.yaml: cannot read it" in problems("memory://configs/none.yaml")[0]


def test_duplicate_keys(file):
    path = file(
        "run:\n  name: x\n  name: y\nmodel: {path: m}\ndata: {train: a}\nrun: {seed: 1, name: z}\n"
        "batch: {global_batch: 4, sequence_length: 8}\nschedule: {steps: 3}\n"
    )
    assert problems(path) == [
        "line 6: duplicate key 'run' (first in line 1). Each key is allowed once. Remove one.",
        "line 3: duplicate key 'name' (first in line 2). Each key is allowed once. Remove one.",
    ]


# --- invalid overrides


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "schedule.steps",
            "override 'schedule.steps': not of the form section.field=value. Write, for example, "
            "schedule.steps=100.",
        ),
        (
            "=3",
            "override number 1: not of the form section.field=value. Write, for example, "
            "schedule.steps=100.",
        ),
        (
            "model..path=3",
            "override 'model..path': not of the form section.field=value. Write, for example, "
            "schedule.steps=100.",
        ),
        (
            "model.path.x=3",
            "override 'model.path.x': model.path is a single value, which has no fields. Override "
            "model.path as a whole.",
        ),
        (
            "data.train=*.jsonl",
            "override 'data.train': the value is not valid YAML (expected alphabetic or numeric "
            "character, but found '.'). Correct it, or quote a text: '...=\"...\"'",
        ),
    ],
)
def test_invalid_overrides(override, line):
    assert refused(override) == [line]


# --- unknown keys


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "optimizer.warmup_steps=3",
            "optimizer.warmup_steps: no such field. Did you mean schedule.warmup_steps?",
        ),
        ("model.dtyp=float32", "model.dtyp: no such field. Did you mean model.dtype?"),
        (
            "batch.global_bacth=4",
            "batch.global_bacth: no such field. Did you mean batch.global_batch?",
        ),
        ("lr=1e-4", "lr: no such field. Did you mean optimizer.learning_rate?"),
        ("optimizer.lr=1e-4", "optimizer.lr: no such field. Did you mean optimizer.learning_rate?"),
        (
            "learning_rate=1e-4",
            "learning_rate: no such field. Did you mean optimizer.learning_rate?",
        ),
        ("optimiser.learning_rate=1e-4", "optimiser: no such section. Did you mean optimizer?"),
        (
            "optimizer.lrr=1e-4",
            "optimizer.lrr: no such field. Allowed in optimizer: name, learning_rate, weight_decay, "
            "decay_exempt, beta1, beta2, eps, momentum, max_grad_norm. Remove it.",
        ),
        ("max_seq_length=9", "max_seq_length: no such field. Did you mean batch.sequence_length?"),
        (
            "data.fields.promt=q",
            "data.fields.promt: no such field. Did you mean data.fields.prompt?",
        ),
        (
            "log.qqqqq=1",
            "log.qqqqq: no such field. Allowed in log: every_steps, straggler_steps, tensorboard, "
            "wandb, mlflow, notify, level. Remove it.",
        ),
        (
            "zzzzz.qqqqq=1",
            "zzzzz: no such section. Allowed: run, model, data, task, prompting, tuning, batch, "
            "optimizer, schedule, zero, cluster, checkpoint, evaluation, anomaly, log, storage. "
            "Remove it.",
        ),
        (
            "data.train=[{path: a, subst: b}]",
            "data.train.0.subst: no such field. Allowed: path, name, weight, repeat, share, "
            "subset, split. Remove it.",
        ),
    ],
)
def test_unknown_keys_and_the_one_that_was_meant(override, line):
    assert refused(override) == [line]


def test_a_dotted_key_in_the_file():
    assert problems({**BASE, "schedule.name": "linear"}) == [
        "schedule.name: a dotted key in the file. Sections nest. Write it indented below schedule:"
    ]


def test_a_misspelled_key_counts_as_the_one_that_was_meant():
    document = {**BASE, "batch": {"global_bacth": 7, "micro_batch": 2, "sequence_length": 8}}
    assert problems(document) == [
        "batch.global_bacth: no such field. Did you mean batch.global_batch?",
        "batch.global_batch=7: not a multiple of batch.micro_batch=2. A step has whole "
        "micro-batches. Set it to 8 or change micro_batch.",
    ]


# --- values


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "batch.global_batch=four",
            "batch.global_batch=four: not a whole number. Allowed: a whole number of at least 1. "
            "Correct it.",
        ),
        (
            "batch.global_batch=4.5",
            "batch.global_batch=4.5: not a whole number. Allowed: a whole number of at least 1. "
            "Correct it.",
        ),
        (
            "batch.global_batch=true",
            "batch.global_batch=true: not a whole number. Allowed: a whole number of at least 1. "
            "Correct it.",
        ),
        (
            "batch.global_batch=0",
            "batch.global_batch=0: out of range. Allowed: a whole number of at least 1. Correct "
            "it.",
        ),
        (
            "batch.micro_batch=null",
            "batch.micro_batch=null: not a whole number. Allowed: a whole number of at least 1. "
            "Correct it, or remove it for the default (1).",
        ),
        (
            "optimizer.learning_rate=high",
            "optimizer.learning_rate=high: not a number. Allowed: a number above 0. Correct it, "
            "or remove it for the default (2e-05).",
        ),
        (
            "optimizer.learning_rate=.inf",
            "optimizer.learning_rate=Infinity: not a number. Allowed: a number above 0. Correct "
            "it, or remove it for the default (2e-05).",
        ),
        (
            "model.dropout=1.5",
            "model.dropout=1.5: out of range. Allowed: a number of at least 0 and below 1, or "
            "null. Correct it, or remove it for the default (null).",
        ),
        (
            "schedule.name=cosin",
            "schedule.name=cosin: not a valid choice. Allowed: one of linear, cosine, constant. "
            "Did you mean cosine?",
        ),
        (
            "zero.stage=4",
            "zero.stage=4: not a valid choice. Allowed: one of 0, 1, 2, 3. Correct it, or remove "
            "it for the default (3).",
        ),
        (
            "data.pack=maybe",
            "data.pack=maybe: not true or false. Allowed: true or false. Correct it, or remove it "
            "for the default (true).",
        ),
        (
            "run.name=My_Run",
            "run.name=My_Run: not of the allowed form. Allowed: lower-case letters, digits and "
            "'-', at most 47, with a letter or digit at both ends. Correct it.",
        ),
        (
            "cluster.workers=some",
            "cluster.workers=some: not a valid value. Allowed: a whole number, or a range such as "
            "1..4 or [1, 4] with both ends at least 1. Correct it, or remove it for the default "
            "(0).",
        ),
        (
            "cluster.workers=0..4",
            "cluster.workers=0..4: out of range. Allowed: a whole number, or a range such as 1..4 "
            "or [1, 4] with both ends at least 1. Correct it, or remove it for the default (0).",
        ),
        (
            "data.train=[]",
            "data.train=[]: empty. Allowed: a path, or a list of paths or of mappings with path, "
            "subset and split; at least one. Correct it.",
        ),
        (
            "data.train=[a, 3]",
            "data.train.1=3: not a source. Allowed: a path, or a mapping with path, name, weight, "
            "repeat, share, subset, split. Correct it.",
        ),
        (
            "data.train=[{split: test}]",
            "data.train.0.path: missing. Needed: a text (fsspec URL, file, folder or glob of "
            "shards). Add it.",
        ),
        (
            "batch=5",
            "batch=5: not a section. Allowed: a mapping with global_batch, micro_batch, "
            "sequence_length. Indent its fields below batch:",
        ),
        ("zero.deepspeed=3", "zero.deepspeed=3: not a mapping. Allowed: a mapping. Correct it."),
    ],
)
def test_values_that_are_not_allowed(override, line):
    assert refused(override) == [line]


def test_a_number_in_place_of_a_text():
    assert problems({**BASE, "run": {"name": 2024}}) == [
        "run.name=2024: not a valid value. Allowed: lower-case letters, digits and '-', at most "
        "47, with a letter or digit at both ends. Put it in quotes."
    ]


def test_no_line_quotes_pydantic():
    for override in (
        "batch.global_batch=[]",
        "cluster.workers={min: 0}",
        "schedule.name=[1]",
        "data.train={}",
        "zero.deepspeed=[1]",
        "storage.options={s3: 4}",
        "cluster.resources_per_worker={a: b}",
    ):
        for line in refused(override):
            assert not any(word in line for word in ("Input", "pydantic", "https", "validation")), (
                line
            )


# --- all problems at once


def test_six_kinds_of_mistakes_are_all_reported(file):
    path = file("""
run: {name: x}
model: {path: m, dtyp: float32}
data: {train: a, overlong: split}
batch: {global_batch: 7, micro_batch: 2}
optimizer: {learning_rate: high}
schedule: {steps: 3, epochs: 1}
zero: {deepspeed: {train_batch_size: 8}}
""")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "model.dtyp",
        "batch.sequence_length",
        "optimizer.learning_rate=high",
        "batch.global_batch=7",
        "schedule.steps=3",
        "data.overlong=split",
        "zero.deepspeed.train_batch_size",
    ]
    assert str(caught.value).startswith(f"{path}: 7 problems\n  - model.dtyp: no such field")


def test_a_broken_field_hides_no_contradiction_elsewhere():
    lines = refused("batch.micro_batch=x", "schedule.warmup_steps=9")
    assert [line.split(":")[0] for line in lines] == [
        "batch.micro_batch=x",
        "schedule.warmup_steps=9",
    ]


def test_inspect_returns_the_valid_fields():
    config, found, source = inspect_config(BASE, ["batch.micro_batch=x"])
    assert (len(found), source, config.model.path) == (1, "config", "m")
    with pytest.raises(AttributeError):
        config.batch.micro_batch  # noqa: B018


def test_long_values_are_truncated_and_credentials_never_shown(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "hush-hush-hush")
    lines = refused(
        "run.name=" + "Z" * 500,
        "optimizer.learning_rate=hush-hush-hush",
        "model.hush=hush-hush-hush",
    )
    assert len(lines[0]) < 300
    assert "hush-hush-hush" not in "\n".join(lines)
