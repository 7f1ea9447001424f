"""A run's folder does not decide where requests go, where files are written, or what code runs."""

from __future__ import annotations

import pytest
import yaml

from dist_ft.config.load import load_config, load_storage_overrides, to_mapping
from dist_ft.config.schema import Source
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.runs import ledger_audit, stored_run
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store

BASE = {
    "run": {"name": "mine"},
    "model": {"path": "org/model"},
    "data": {"train": "data/*.jsonl"},
    "batch": {"global_batch": 4, "sequence_length": 64},
    "schedule": {"steps": 3},
}
HOSTILE = [
    "storage.options={s3: {endpoint_url: 'http://evil'}}",
    "data.cache_dir=/home/me/.ssh",
    "model.tokenizer=http://evil/tokenizer",
    "model.chat_template=/etc/passwd",
    "model.trust_remote_code=true",
    "cluster.address=evil:6379",
    "cluster.workers=2",
    "cluster.network_variables={GLOO_SOCKET_IFNAME: evil0}",
    "log.mlflow={experiment: x}",
]


@pytest.fixture
def store(tmp_path):
    config = load_config(BASE, HOSTILE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_mapping(config)))
    return Store(str(tmp_path))


def test_config_to_score_by_has_nothing_of_the_machine(store):
    config = stored_run.config_to_score_by(store)
    assert config.storage.options == {} and config.data.cache_dir is None
    assert config.model.tokenizer is None and config.model.chat_template is None
    assert not config.model.trust_remote_code
    assert config.cluster == type(config.cluster)(workers=0) and config.log == type(config.log)()
    assert config.batch == load_config(BASE).batch, "what scores depend on stays"


def test_options_of_a_run_are_not_configured(store, monkeypatch):
    """No command configures this process by what is stored."""
    configured = []
    monkeypatch.setattr(filesystem, "configure", configured.append)
    for action in (ledger_audit.audit, ledger_audit.verify_shards):
        with pytest.raises(DataError):
            action(store.url)
    assert configured == []


@pytest.mark.parametrize(
    "path", ["s3://evil/x", "http://evil/x.jsonl", "zip::http://evil/x", "evil/set"]
)
def test_data_elsewhere_are_refused_in_one_line(store, path):
    with pytest.raises(DataError) as caught:
        stored_run.require_readable(store, [Source(path=path)], "data.train", (), "Name it.")
    assert str(caught.value).startswith(f"data.train={path}: named by {store.url}")
    assert str(caught.value).endswith(" Name it.")
    stored_run.require_readable(store, [Source(path=path)], "data.train", (path,), "")


def test_every_source_is_examined_before_any_is_read(store):
    sources = [Source(path="data/x.jsonl"), Source(path="s3://evil/x")]
    with pytest.raises(DataError, match="s3://evil/x"):
        stored_run.require_readable(store, sources, "data.train", (), "")


def test_places_of_a_users_config():
    config = load_config(BASE, ["evaluation.data=[s3://b/x, org/set]"])
    assert stored_run.named_places(config) == ("data/*.jsonl", "s3://b/x", "org/set")


def test_storage_options_for_a_folder():
    section = load_storage_overrides(["storage.options.s3.endpoint_url=http://127.0.0.1:5000"])
    assert section.options == {"s3": {"endpoint_url": "http://127.0.0.1:5000"}}
    assert load_storage_overrides([]).options == {}
    with pytest.raises(ConfigError, match="run: cannot be overridden, as the run is given by its"):
        load_storage_overrides(["run.name=x"])
    with pytest.raises(ConfigError, match=r"not of the form section\.field=value"):
        load_storage_overrides(["x"])
    with pytest.raises(ConfigError, match="storage"):
        load_storage_overrides(["storage.options=5"])
