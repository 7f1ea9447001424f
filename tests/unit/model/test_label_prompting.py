"""Label prompting: scores equal those computed by hand and do not depend on other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from unit import small

from dist_ft.config.schema import OptimizerSection
from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch, empty_batch
from dist_ft.data.encoding.prompt_templates import LabelWords
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.label_prompting import LabelPromptModel
from dist_ft.model.task_models import SpecialTokens

TASK = TaskSection(name="sequence_classification", labels=("a", "b", "c"))
IDS = ((5,), (6, 7, 8), (6, 9))
WORDS = LabelWords(IDS)
PROMPTS = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33, 34, 35, 36, 37, 38, 39]]
LABELS = [1, 0, 2]


def batch(rows=PROMPTS, labels=LABELS):
    width = max(map(len, rows))
    ids, targets = (
        np.zeros((len(rows), width), np.int64),
        np.full((len(rows), width), IGNORE_INDEX, np.int64),
    )
    for i, row in enumerate(rows):
        ids[i, : len(row)], targets[i, 0] = row, labels[i]
    segments = np.array([(i, 0, len(row), 0) for i, row in enumerate(rows)], np.int64)
    return Batch(ids, targets, np.zeros_like(ids), segments, 0)


def module(family="llama", words=WORDS, task=TASK, **options):
    return LabelPromptModel(small.make_model(family), task, SpecialTokens(0), words, 64, **options)


def by_hand(model, prompt, words):
    """Return the log-probability of each token of `words` after `prompt`, by a plain forward."""
    with torch.no_grad():
        shares = torch.log_softmax(
            model(input_ids=torch.tensor([[*prompt, *words]]), use_cache=False).logits[0].float(),
            -1,
        )
    return [shares[len(prompt) + i - 1, word].item() for i, word in enumerate(words)]


@pytest.mark.parametrize("family", sorted(small.FAMILIES))
@pytest.mark.parametrize("mean", [False, True])
def test_scores_equal_those_computed_by_hand(family, mean):
    scorer = module(family, LabelWords(IDS, use_mean=mean)).eval()
    with torch.no_grad():
        loss, scores = scorer(**scorer.prepare_inputs(batch(), "cpu"), return_outputs=True)
        plain = scorer(**scorer.prepare_inputs(batch(), "cpu"))
    expected = [
        [(np.mean if mean else np.sum)(by_hand(scorer.model, prompt, words)) for words in IDS]
        for prompt in PROMPTS
    ]
    assert scores.numpy() == pytest.approx(np.array(expected), abs=2e-5)
    expected_loss = -sum(expected[i][label] for i, label in enumerate(LABELS))
    assert loss.item() == pytest.approx(expected_loss, abs=5e-5)
    assert plain.item() == pytest.approx(expected_loss, abs=5e-5), "training uses the same scores"


def test_model_without_a_cache_gives_the_same_scores():
    scorer = module().eval()
    inputs = scorer.prepare_inputs(batch(), "cpu")
    with torch.no_grad():
        _, cached = scorer(**inputs, return_outputs=True)
        scorer._takes_use_cache = False
        _, whole = scorer(**inputs, return_outputs=True)
    assert torch.allclose(cached, whole, atol=1e-5)


def test_calibration_divides_by_content_free_shares():
    empty = ((41, 42), (43,), (44, 45, 46))
    plain, scorer = module().eval(), module(words=LabelWords(IDS, empty)).eval()
    with torch.no_grad():
        raw_loss, raw = plain(**plain.prepare_inputs(batch(), "cpu"), return_outputs=True)
        loss, found = scorer(**scorer.prepare_inputs(batch(), "cpu"), return_outputs=True)
    rows = torch.tensor(
        [[sum(by_hand(scorer.model, prompt, words)) for words in IDS] for prompt in empty]
    )
    expected = torch.softmax(raw, 1) / torch.softmax(rows, 1).mean(0)
    assert torch.allclose(
        torch.softmax(found, 1), expected / expected.sum(1, keepdim=True), atol=1e-5
    )
    assert loss.item() == pytest.approx(raw_loss.item(), abs=1e-5), "the loss is not calibrated"


def test_scores_do_not_depend_on_other_rows():
    scorer = module("gpt2").eval()
    with torch.no_grad():
        _, together = scorer(**scorer.prepare_inputs(batch(), "cpu"), return_outputs=True)
        alone = [
            scorer(**scorer.prepare_inputs(batch([prompt], [0]), "cpu"), return_outputs=True)[1]
            for prompt in PROMPTS
        ]
    assert torch.allclose(together, torch.cat(alone), atol=2e-5)


def test_empty_batch_has_zero_loss_and_gradients():
    scorer = module()
    loss = scorer(**scorer.prepare_inputs(empty_batch(), "cpu"))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in scorer.parameters())


def test_class_weights_scale_the_loss():
    weighed = module(task=TASK.model_copy(update={"class_weights": (2.0, 3.0, 5.0)})).eval()
    plain = module().eval()
    with torch.no_grad():
        each = [
            plain(**plain.prepare_inputs(batch([p], [label]), "cpu")).item()
            for p, label in zip(PROMPTS, LABELS, strict=True)
        ]
        actual = weighed(**weighed.prepare_inputs(batch(), "cpu")).item()
    assert actual == pytest.approx(3 * each[0] + 2 * each[1] + 5 * each[2], rel=1e-5)


def test_training_learns_the_labels():
    engine = TorchEngine(module(), OptimizerSection(learning_rate=5e-3), torch.device("cpu"))
    for step in range(25):
        engine.train_step([batch()], [step], 3, 5e-3)
    _, scores = engine.loss_and_outputs(batch())
    assert scores.argmax(1).tolist() == LABELS


def test_noise_and_smoothing_apply_in_training_only():
    noisy, plain = module(neftune_alpha=5.0, label_smoothing=0.1), module()
    inputs = plain.prepare_inputs(batch(), "cpu")
    with torch.no_grad():
        assert noisy(**inputs).item() != pytest.approx(plain(**inputs).item(), abs=1e-3)
        noisy.eval(), plain.eval()
        assert noisy(**inputs).item() == pytest.approx(plain(**inputs).item(), abs=1e-5)


def test_sequence_longer_than_the_model_is_refused():
    with pytest.raises(
        ModelError, match=r"batch\.sequence_length=200: longer than the model accepts. At most 128"
    ):
        LabelPromptModel(small.make_model("llama"), TASK, SpecialTokens(0), LabelWords(IDS), 200)
