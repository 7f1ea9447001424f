"""Label smoothing and NEFTune: in training only, as in their papers, whatever is packed."""

from __future__ import annotations

import pytest
import torch
from unit.small import batch, make_model, make_module, split_into_samples

from dist_ft.model.causal_lm import CausalLM, batch_to_inputs


def loss(module: CausalLM, rows) -> float:
    torch.manual_seed(3)
    with torch.no_grad():
        return module(**batch_to_inputs(rows, "cpu")).item()


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # with and without the chunked head
def test_label_smoothing_applies_in_training_only(family):
    rows, model = batch((12,)), make_model(family)
    plain, smooth = CausalLM(model).train(), CausalLM(model, label_smoothing=0.2).train()
    inputs = batch_to_inputs(rows, "cpu")
    with torch.no_grad():
        logits = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).logits
    chosen = logits.reshape(-1, logits.shape[-1])[inputs["target_positions"]]
    expected = torch.nn.functional.cross_entropy(
        chosen, inputs["targets"], reduction="sum", label_smoothing=0.2
    ).item()
    assert loss(smooth, rows) == pytest.approx(expected, rel=1e-5) and expected != pytest.approx(
        loss(plain, rows), rel=1e-3
    )
    assert loss(smooth.eval(), rows) == pytest.approx(loss(plain.eval(), rows), rel=1e-6)


def noise_of(module: CausalLM, rows) -> torch.Tensor:
    """Return what is added to the embeddings in a forward pass."""
    seen: list[torch.Tensor] = []
    embedding = module.model.get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda layer, args, output: seen.append(output.detach() - layer.weight[args[0]])
    )
    loss(module, rows)
    handle.remove()
    return seen[0]


def test_noise_is_bounded_by_the_sample_length():
    module, rows = CausalLM(make_model(), neftune_alpha=5.0).train(), batch((25, 4), (9, 20))
    noise = noise_of(module, rows)
    width = noise.shape[-1]
    for row, sizes in ((0, (25, 4)), (1, (9, 20))):
        start = 0
        for size in sizes:
            bound = 5.0 / (size * width) ** 0.5
            part = noise[row, start : start + size]
            assert 0.9 * bound < part.abs().max() <= bound * (1 + 1e-6)
            assert part.std() == pytest.approx(bound / 3**0.5, rel=0.2)
            start += size


def test_noise_follows_from_the_seed_and_applies_in_training_only():
    module, rows = CausalLM(make_model(), neftune_alpha=5.0).train(), batch((7, 5), (9,))
    assert loss(module, rows) == loss(module, rows) != loss(module.eval(), rows)
    assert loss(module.eval(), rows) == pytest.approx(loss(make_module().eval(), rows), rel=1e-6)
    assert len(split_into_samples(rows)) == 3
