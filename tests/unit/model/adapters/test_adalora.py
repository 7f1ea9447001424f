"""AdaLoRA: ranks follow from the step alone, and a resumed schedule is bit-exact."""

from __future__ import annotations

import pytest
import torch
from unit import small

from dist_ft.config.schema import OptimizerSection
from dist_ft.config.sections.tuning import TuningSection
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.model.adapters import adalora, tuning
from dist_ft.model.causal_lm import CausalLM

SECTION = {"initial_rank": 4, "rank": 2, "begin_step": 2, "end_step": 8, "every_steps": 2}


def make_engine(**fields) -> TorchEngine:
    model = small.make_model()
    tuning.apply_tuning(model, TuningSection(method="adalora", adalora=SECTION | fields), 3)
    return TorchEngine(CausalLM(model), OptimizerSection(learning_rate=1e-2), torch.device("cpu"))


def train(engine: TorchEngine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        engine.step = step + 1
        losses += small.train(engine, range(step, step + 1))
    return losses


def num_ranks(engine: TorchEngine) -> int:
    found = [p for name, p in engine.module.named_parameters() if ".lora_E." in name]
    return int(sum((p != 0).sum() for p in found))


def test_ranks_fall_to_the_budget_and_stay():
    engine = make_engine()
    matrices = sum(".lora_E." in name for name, _ in engine.module.named_parameters())
    seen = []
    for step in range(11):
        train(engine, range(step, step + 1))
        seen.append(num_ranks(engine))
    assert seen[:2] == [4 * matrices] * 2
    assert 2 * matrices < seen[3] < 4 * matrices  # cubic: most are removed at first
    assert seen[7:] == [2 * matrices] * 4


def test_resumed_schedule_is_bit_exact():
    unbroken = make_engine()
    expected = train(unbroken, range(12))
    for broken in (3, 6, 8, 10):
        first, second = make_engine(), make_engine()
        train(first, range(broken))
        held = {(slot.name, slot.key): slot.read().clone() for slot in first.state_slices()}
        for slot in second.state_slices():
            slot.write(held[slot.name, slot.key])
        second.finish_load(first.optimizer_step())
        assert train(second, range(broken, 12)) == expected[broken:]


def test_penalty_equals_peft_and_applies_in_training_only():
    engine = make_engine(orthogonality=0.7)
    own = adalora.find_rank_schedule(engine.module.model).penalty().item()
    matrices = [
        p.detach()
        for name, p in engine.module.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    ]
    squares = [m @ m.T if m.shape[0] == 4 else m.T @ m for m in matrices]
    assert own == pytest.approx(
        0.7 * sum(torch.norm(s - torch.eye(4)).item() for s in squares) / len(squares), rel=1e-5
    )
    batch = small.batch((7, 5), (9,))
    inputs = engine.module.prepare_inputs(batch, "cpu")
    with torch.no_grad():
        plain, trained = engine.module.eval()(**inputs), engine.module.train()(**inputs)
    assert (trained - plain).item() == pytest.approx(own * batch.num_target_tokens, rel=1e-4)
