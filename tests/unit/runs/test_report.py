"""The report shows what a run has stored, in three formats; text from data is escaped."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import tiny_tasks

from dist_ft.checkpoint import trained_model
from dist_ft.config.load import load_config
from dist_ft.core.errors import DataError
from dist_ft.inference import attributions
from dist_ft.runs import render_report, report
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    base = tiny_tasks.base(tmp_path_factory.mktemp("report"))
    document = tiny_tasks.config(
        base, "sequence_classification", "reported", task={"labels": [*tiny_tasks.LABELS, EVIL]}
    )
    document["evaluation"]["every_steps"] = 5
    result = local.run(load_config(document))
    return result.run_url


@pytest.fixture(scope="module")
def found(url):
    return report.gather(url)


def test_report_holds_what_the_run_stored(found):
    assert (
        found["task"] == "sequence_classification"
        and found["steps"] == 20
        and len(found["train"]) == 20
    )
    assert [line["step"] for line in found["evaluations"]] == [0, 5, 10, 15, 20]
    assert found["best"]["metric"] == "loss" and found["best"]["value"] == min(
        line["loss"] for line in found["evaluations"]
    )
    assert (
        sum(map(sum, found["tables"]["confusion"])) == 23 and found["tables"]["labels"][-1] == EVIL
    )
    assert json.loads(json.dumps(found)) == found
    rows = {
        name: (first, last)
        for name, first, last in render_report.metric_changes(found["evaluations"])
    }
    assert rows["loss"][1] < rows["loss"][0]
    wrong = round((1 - found["evaluations"][-1]["accuracy"]) * 23)
    assert len(found["examples"]) == min(20, wrong) and found["examples_step"] == 20
    scores = [one["score"] for one in found["examples"]]
    assert scores == sorted(scores, reverse=True)
    assert found["facts"]["training data"].endswith(
        f": 2 shards, 96 samples, {found['facts']['training data'].split()[-2]} tokens"
    )
    assert (
        "torch 2" in found["facts"]["versions"]
        and found["facts"]["engine"] == "plain PyTorch, 1 worker"
    )


def test_tokens_of_errors_get_attributions(found, url):
    """Attributions sum to the logit of the text minus that of padding (completeness axiom)."""
    pytest.importorskip("captum", reason="attributions need the extra explain")
    import torch

    examples = json.loads(Store(url).read("evaluations/step-000000000.json"))["examples"][
        :3
    ]  # of an untrained head
    assert attributions.attribute(Store(url), examples, 0)["step"] == 20
    manifest = trained_model.find_manifest(Store(url), 20)
    model, tokenizer = trained_model.load_trained_model(Store(url), manifest, "float32")
    for one in examples:
        ids = torch.tensor([one["ids"]])
        special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
        padding = torch.where(special, ids, tokenizer.pad_token_id)
        with torch.no_grad():
            label = one["at"][0]
            expected = model(input_ids=ids).logits[0, label]
            expected = (
                expected
                - model(input_ids=padding, attention_mask=torch.ones_like(ids)).logits[0, label]
            ).item()
        assert sum(weight for _, weight in one["tokens"]) == pytest.approx(
            expected, abs=0.05 * max(1, abs(expected))
        )
        assert "".join(text for text, _ in one["tokens"]).split() == one["text"].split()
    page = render_report.to_html(
        {**found, "examples": examples, "attributions": {"step": 20, "method": "m"}}
    )
    assert page.count('title="') >= len(examples[0]["tokens"]) and "rgba(230, 120, 20" in page


def test_texts_of_examples_are_escaped_in_html_and_markdown(found):
    evil = {
        "sample": 1,
        "window": 0,
        "text": f"{EVIL} | a",
        "expected": EVIL,
        "predicted": "<b>",
        "score": 0.5,
        "ids": [],
        "at": [0],
        "tokens": [[EVIL, 0.5], ["x", -0.25]],
    }
    content = {**found, "examples": [evil], "facts": {"base model": EVIL}}
    assert EVIL not in render_report.to_html(content) and "<b>" not in render_report.to_html(
        content
    )
    assert EVIL not in render_report.to_markdown(
        {**content, "config": ""}
    ) and "\\| a" in render_report.to_markdown(content)
    assert render_report.shade_tokens([["a", 2.0], ["b", -1.0]])[1][1] == "rgba(30, 110, 200, 0.38)"


def test_the_page_is_well_formed_and_self_contained(found):
    class Page(HTMLParser):
        tags: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag, attrs):
            self.tags.append(tag)
            values = dict(attrs)
            assert not {"src", "srcset"} & values.keys() and not str(
                values.get("href", "")
            ).startswith("http"), values

    text = render_report.to_html(found)
    page = Page()
    page.feed(text)
    assert "script" not in page.tags and EVIL not in text and "&lt;script&gt;" in text
    assert page.tags.count("svg") >= 4 and "url(http" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    for word in (
        "By label",
        "Confusion matrix",
        "Held-out data",
        "sequence classification",
        "every_steps: 5",
    ):
        assert word in text


def test_markdown_has_the_tables(found):
    text = render_report.to_markdown(found)
    assert (
        "| accuracy | " in text
        and "## By label" in text
        and "| animal | " in text
        and "```yaml" in text
    )


def test_most_confused_pairs_come_first():
    assert render_report.most_confused(["a", "b", "c"], [[3, 1, 0], [0, 2, 5], [0, 0, 1]]) == [
        ("b", "c", 5),
        ("a", "b", 1),
    ]


def test_long_curves_are_thinned():
    points = [(float(step), float(step % 2)) for step in range(1, 2401)]
    thin = render_report._thin_out(points)
    assert len(thin) == 600 and thin[-1][0] == 2400 and all(value == 0.5 for _, value in thin)


def test_a_folder_without_run_or_metrics_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"not a run \(it has no run\.yaml\)"):
        report.gather(str(tmp_path))
    Store(str(tmp_path)).write("run.yaml", b"run: {name: x}")
    with pytest.raises(DataError, match="no metrics yet"):
        report.gather(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b'{"loss": 1', b"[1]", b"7", b'{"examples": [1]}', b"\xff"]
)
def test_finding_12_a_damaged_evaluation_is_left_out(url, tmp_path, caplog, content):
    """The report shows the latest one that can be read, and says so."""
    run = shutil.copytree(url, tmp_path / "reported")
    (run / "evaluations/step-000000020.json").write_bytes(content)
    (run / "evaluations/notes.txt").write_bytes(b"")
    found = report.gather(str(run))
    assert found["examples_step"] == 15 and found["tables"]["confusion"]
    assert "the evaluation at step 20 is left out" in caplog.text
    assert "the evaluation at step 20 is left out: " in caplog.text


def test_fault_26_without_its_evaluations_a_run_has_a_report(url, tmp_path):
    run = shutil.copytree(url, tmp_path / "reported")
    shutil.rmtree(run / "evaluations")
    found = report.gather(str(run))
    assert found["examples_step"] is None and found["tables"] == {} and len(found["train"]) == 20
