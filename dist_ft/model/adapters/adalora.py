"""AdaLoRA's dealing of ranks (Zhang et al., arXiv:2303.10512): what each rank is worth, and when which are set to zero.

`peft` does the arithmetic. Here what it remembers between steps (how much each weight mattered, which ranks are left)
becomes buffers of the model, so a checkpoint holds it and a resumed run deals as the one that never stopped. The budget
follows from the run's step alone. Wants whole weights and gradients: one process, or ZeRO-0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "rank_schedule"
"""What the module is called in a model."""


class RankSchedule(nn.Module):
    """What has been seen of the added weights, and who is told after each update."""

    def __init__(self, tuner: Any) -> None:
        """Watch the adapters of peft's AdaLoRA `tuner`."""
        super().__init__()
        self._tuner = (tuner,)  # in a tuple, as it is no part of this module
        self._names = [name for name, _ in tuner.model.named_parameters() if ".lora_" in name]
        for index, parameter in enumerate(self._weights().values()):
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{index}", torch.zeros_like(parameter))
            self.register_buffer(f"kept_{index}", torch.ones_like(parameter[..., 0]))

    def _weights(self) -> dict[str, nn.Parameter]:
        own = dict(self._tuner[0].model.named_parameters())
        return {name: own[name] for name in self._names}

    def after_update(self, step: int) -> None:
        """Weigh the weights by the gradient of `step` (1: the first), and set to zero the ranks the budget is short of.

        The gradients must still be there, and be the same on all workers.
        """
        (tuner,) = self._tuner
        allocator, config = tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name]
        weights, end = self._weights(), config.total_step - config.tfinal
        for index, (name, parameter) in enumerate(weights.items()):
            allocator.ipt[name] = torch.zeros_like(parameter)
            allocator.exp_avg_ipt[name] = self.get_buffer(f"sensitivity_{index}")
            allocator.exp_avg_unc[name] = self.get_buffer(f"uncertainty_{index}")
        config.rank_pattern = {
            name: self.get_buffer(f"kept_{index}").bool().tolist()
            for index, name in enumerate(weights)
            if ".lora_E." in name
        }
        if step == end:
            allocator.update_ipt(
                tuner.model
            )  # peft leaves the last gradient out, and forgets what it knew
            pattern = allocator.mask_to_budget(tuner.model, allocator.target_bgt)
            config.rank_pattern = pattern
        else:
            tuner.update_and_allocate(step)
        for index, name in enumerate(weights):
            if step <= end:
                self.get_buffer(f"sensitivity_{index}").copy_(allocator.exp_avg_ipt[name])
                self.get_buffer(f"uncertainty_{index}").copy_(allocator.exp_avg_unc[name])
            if name in config.rank_pattern:
                self.get_buffer(f"kept_{index}").copy_(torch.tensor(config.rank_pattern[name]))

    def penalty(self) -> torch.Tensor:
        """Return how far the added matrices are from orthogonal ones, times its weight, float32 ()."""
        (tuner,) = self._tuner
        found = []
        for name, parameter in self._weights().items():
            if ".lora_E." not in name:
                square = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
                found.append(torch.norm(square - torch.eye(len(square), device=square.device)))
        weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
        return torch.stack(found).mean() * weight


def add_rank_schedule(model: PreTrainedModel, tuner: Any) -> None:
    """Give `model` the schedule of its AdaLoRA matrices, peft's `tuner`."""
    model.add_module(NAME, RankSchedule(tuner))


def find_rank_schedule(model: PreTrainedModel) -> RankSchedule | None:
    """Return a model's schedule, if it has one."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, RankSchedule) else None
