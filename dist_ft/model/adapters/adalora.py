"""AdaLoRA's rank schedule: the importance of each rank, and which ranks are zeroed when.

Method: Zhang et al., arXiv:2303.10512.

`peft` does the arithmetic. Here its memory between steps (the importance of each weight, the
remaining ranks) becomes buffers of the model, so a checkpoint stores it and a resumed run continues
exactly like an uninterrupted one. The budget follows from the run's step alone. Needs whole weights
and gradients: one process, or ZeRO-0.

Dimensions: R ranks of an adapter, which adds lora_B (out, R) @ (lora_A (R, in) * lora_E (R, 1)) to
the weight (out, in).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "rank_schedule"
"""Name of the module in a model."""


class RankSchedule(nn.Module):
    """Zeroes ranks of AdaLoRA adapters after updates; buffers hold the weights' importance.

    For adapter weight i the buffers are `sensitivity_i` and `uncertainty_i`, averages of its shape,
    and `kept_i`, 1 for each remaining rank.
    """

    def __init__(self, tuner: Any) -> None:
        """Schedule the adapters of peft's AdaLoRA `tuner`."""
        super().__init__()
        # In a tuple, because it must not become a submodule: it holds the model that holds this.
        self._tuner = (tuner,)
        self._names = [name for name, _ in tuner.model.named_parameters() if ".lora_" in name]

        # Numbered, because the name of a buffer cannot contain the dots of a weight's name.
        for index, parameter in enumerate(self._weights().values()):
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{index}", torch.zeros_like(parameter))
            self.register_buffer(f"kept_{index}", torch.ones_like(parameter[..., 0]))

    def _weights(self) -> dict[str, nn.Parameter]:
        parameters = dict(self._tuner[0].model.named_parameters())
        return {name: parameters[name] for name in self._names}

    def after_update(self, step: int) -> None:
        """Update the importance of weights from gradients, and zero the ranks beyond the budget.

        The gradients of `step` (1: the first) must still exist, and be the same on all workers.
        """
        (tuner,) = self._tuner
        allocator = tuner.rankallocator
        config = tuner.peft_config[tuner.trainable_adapter_name]
        last_step = config.total_step - config.tfinal

        # The buffers decide: after a restart peft's own state is empty.
        self._write_to_peft(allocator, config)
        if step == last_step:
            # In this step peft itself would ignore the gradient and then drop its averages.
            allocator.update_ipt(tuner.model)
            config.rank_pattern = allocator.mask_to_budget(tuner.model, allocator.target_bgt)
        else:
            tuner.update_and_allocate(step)

        # After the last step the ranks stay, and peft does not update the importance any more.
        self._read_from_peft(allocator, config, read_importance=step <= last_step)

    def _write_to_peft(self, allocator: Any, config: Any) -> None:
        """Copy the buffers into peft's allocator and config."""
        rank_pattern = {}
        for index, (name, parameter) in enumerate(self._weights().items()):
            # peft restarts the averages of a weight that has no entry here; the value is not read.
            allocator.ipt[name] = torch.zeros_like(parameter)
            allocator.exp_avg_ipt[name] = self.get_buffer(f"sensitivity_{index}")
            allocator.exp_avg_unc[name] = self.get_buffer(f"uncertainty_{index}")
            if ".lora_E." in name:
                rank_pattern[name] = self.get_buffer(f"kept_{index}").bool().tolist()
        config.rank_pattern = rank_pattern

    def _read_from_peft(self, allocator: Any, config: Any, read_importance: bool) -> None:
        """Copy the state of peft's allocator and config into the buffers."""
        for index, name in enumerate(self._names):
            if read_importance:
                self.get_buffer(f"sensitivity_{index}").copy_(allocator.exp_avg_ipt[name])
                self.get_buffer(f"uncertainty_{index}").copy_(allocator.exp_avg_unc[name])
            if name in config.rank_pattern:
                self.get_buffer(f"kept_{index}").copy_(torch.tensor(config.rank_pattern[name]))

    def penalty(self) -> torch.Tensor:
        """Return the orthogonality penalty, float32 ().

        It is the mean distance of the adapter matrices from orthogonal ones, times its weight.
        """
        (tuner,) = self._tuner
        distances = []
        for name, parameter in self._weights().items():
            # lora_E holds the singular values, which may have any size.
            if ".lora_E." in name:
                continue

            matrix = parameter.T
            if ".lora_A." in name:
                matrix = parameter
            gram = matrix @ matrix.T  # (R, R)
            identity = torch.eye(len(gram), device=gram.device)
            distances.append(torch.norm(gram - identity))

        weight = tuner.peft_config[tuner.trainable_adapter_name].orth_reg_weight
        return torch.stack(distances).mean() * weight


def add_rank_schedule(model: PreTrainedModel, tuner: Any) -> None:
    """Add to `model` the schedule of the AdaLoRA adapters of peft's `tuner`."""
    model.add_module(NAME, RankSchedule(tuner))


def find_rank_schedule(model: PreTrainedModel) -> RankSchedule | None:
    """Return a model's schedule, if it has one."""
    module = getattr(model, NAME, None)
    return module if isinstance(module, RankSchedule) else None
