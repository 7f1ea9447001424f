"""Expected risk: by hand, by separate rows, and lowered by training."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from unit.model.test_generation import Words, bart, decoder
from unit.small import batch, make_model

from dist_ft.config.sections.task import RiskSection, TaskSection
from dist_ft.data.batch import empty_batch
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.minimum_risk import RiskBatch, RiskCausalLM, RiskSeq2Seq, expected_risk
from dist_ft.model.task_models import SpecialTokens, TaskModel
from dist_ft.training.held_out_generation import HeldOutSample
from dist_ft.training.minimum_risk import MinimumRisk

PROMPTS = ([5, 9, 30], [7], [50, 51, 52, 53, 54])
REFERENCES = ([11, 12, 2], [13, 2], [14, 15, 16, 17, 2])
DRAWN = ([[11, 40, 2], [11, 12, 2], [60] * 6], [[13, 2], [13, 2], [13, 2]], [[70, 2], [], [70, 2]])


def test_expected_risk_equals_a_hand_computation():
    logs, risks = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([0.0, 0.8, 0.4])
    found = expected_risk(logs, risks, torch.tensor([0, 0, 1]), 2, 0.5)
    first, second = math.exp(-0.5), math.exp(-1.5)
    assert found.item() == pytest.approx(second / (first + second) * 0.8 + 0.4)
    deep = expected_risk(logs - 5000, risks, torch.tensor([0, 0, 1]), 2, 0.5)
    assert deep.item() == pytest.approx(found.item()), (
        "only differences count, however unlikely a text is"
    )


def risk_batch(both: bool, metric: str = "token_f1") -> RiskBatch:
    config = SimpleNamespace(
        task=SimpleNamespace(
            risk=RiskSection(metric=metric), name="seq2seq" if both else "causal_lm"
        ),
        run=SimpleNamespace(seed=0),
        evaluation=SimpleNamespace(text_tokenizer="13a"),
    )
    samples = [
        HeldOutSample(number, np.array(prompt), np.array(target))
        for number, (prompt, target) in enumerate(zip(PROMPTS, REFERENCES, strict=True))
    ]
    return MinimumRisk(config, Words())._risk_batch(empty_batch(lane=4), samples, DRAWN, decoder())


def test_equal_texts_count_once_and_the_reference_has_no_risk():
    found = risk_batch(False)
    assert found.groups.tolist() == [0, 0, 0, 1, 2, 2]
    assert found.risks.tolist() == pytest.approx([0, 1 - 2 / 4, 1, 0, 0, 1])
    assert found.lane == 4 and found.segments[:, 0].tolist() == found.groups.tolist()


def alone(model, prompt: list[int], text: list[int], both: bool) -> torch.Tensor:
    """Return the log-probability of a text, by a plain forward of its own."""
    if both:
        logits = model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[2, *text[:-1]]])
        ).logits[0]
    else:
        logits = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum()


def by_rows(model, section: RiskSection, both: bool) -> torch.Tensor:
    total = torch.zeros(())
    found = risk_batch(both)
    texts = [[11, 12, 2], [11, 40, 2], [60] * 6, [13, 2], [14, 15, 16, 17, 2], [70, 2]]
    for group in range(3):
        rows = [row for row in range(6) if found.groups[row] == group]
        logs = torch.stack([alone(model, list(PROMPTS[group]), texts[row], both) for row in rows])
        total = (
            total + (torch.softmax(section.alpha * logs, 0) * torch.tensor(found.risks)[rows]).sum()
        )
        total = total - section.likelihood_weight * logs[0] / len(REFERENCES[group])
    return total


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("both", [False, True])
def test_risk_and_gradient_equal_those_of_separate_rows(both, weight):
    section = RiskSection(alpha=0.3, likelihood_weight=weight)
    model, plain = (bart(), bart()) if both else (make_model(), make_model())
    module = (
        RiskSeq2Seq(model, TaskSection(name="seq2seq"), SpecialTokens(0), section)
        if both
        else RiskCausalLM(model, section)
    )
    loss, expected = (
        module(**module.prepare_inputs(risk_batch(both), "cpu")),
        by_rows(plain, section, both),
    )
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and expected.item() > 0.3
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


@pytest.mark.parametrize("both", [False, True])
def test_plain_batches_get_cross_entropy(both):
    section, special = RiskSection(), SpecialTokens(0)
    if both:
        ours, plain = (
            RiskSeq2Seq(bart(), TaskSection(name="seq2seq"), special, section),
            TaskModel(bart(), TaskSection(name="seq2seq"), special),
        )
    else:
        ours, plain = RiskCausalLM(make_model(), section), CausalLM(make_model())
    for given in (batch((9,), (7,)), empty_batch()):
        ours(**ours.prepare_inputs(risk_batch(both), "cpu"))
        assert ours(**ours.prepare_inputs(given, "cpu")).item() == pytest.approx(
            plain(**plain.prepare_inputs(given, "cpu")).item()
        )


def test_training_lowers_the_expected_risk():
    section = RiskSection(alpha=0.3)
    module = RiskCausalLM(make_model(), section)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    losses = []
    for _ in range(20):
        loss = module(**module.prepare_inputs(risk_batch(False), "cpu"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
