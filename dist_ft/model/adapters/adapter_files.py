"""Adapter folders: the weights that a run added or trained, written for `peft` and read back.

Trained weights of the model itself (a new head, norms) are peft's `modules_to_save`. Bottleneck
adapters, which peft does not support, are stored under their own names and are read by dist_ft
only. Guarantees: a folder remains only if the adapter read from it gives the logits of the one that
was written. The folder does not hold the base model.

Dimensions: T tokens of a row, P virtual tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import PROMPT_METHODS, TuningSection
from dist_ft.core.errors import CheckpointError, ModelError
from dist_ft.model.adapters import added_layers, soft_prompts, tuning
from dist_ft.pretrained import pretrained_model, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RELATIVE_DIFFERENCE = 1e-4
"""Allowed difference between written and read logits, relative to the largest."""
VIRTUAL_TOKEN_KEY = "prompt_embeddings"
"""peft's key of the vectors of virtual tokens."""


def save_adapter(
    model: PreTrainedModel,
    peft_model: Any,
    section: TuningSection,
    base: tuple[str, str | None],
    folder: Path,
) -> None:
    """Write the trained weights of `model` to `folder`.

    Args:
        model: the model with the adapter.
        peft_model: peft's model around it, or None.
        section: the tuning method.
        base: path and revision of the base model.
        folder: created if absent.

    Raises:
        CheckpointError: peft cannot store one of the weights with an adapter.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    own_weights = _trained_model_weights(model, section)
    own_state = {name: parameter.detach() for name, parameter in own_weights.items()}

    if section.method == "bottleneck":
        state = own_state
        for name, parameter in model.named_parameters():
            if added_layers.is_added(name):
                state[name] = parameter.detach()
    else:
        state = _peft_state(model, peft_model, own_state)
        config = _peft_config(model, peft_model)
        # peft restores whole modules: it replaces them by copies with the weights from the file.
        modules = {name.rpartition(".")[0] for name in own_weights}
        config.modules_to_save = sorted(modules) or None
        config.base_model_name_or_path, config.revision = base
        config.inference_mode = True
        config.save_pretrained(folder)

    # The config holds the labels of a new head, which the base model's config does not have.
    model.config.save_pretrained(folder)

    # safetensors rejects tensors that share memory or are not contiguous.
    tensors = {name: values.contiguous().clone() for name, values in state.items()}
    save_file(tensors, folder / WEIGHTS_FILE)


def _peft_config(model: PreTrainedModel, peft_model: Any) -> Any:
    """Return peft's config of the adapter in `model`."""
    virtual = soft_prompts.find_virtual_tokens(model)
    if virtual is not None:
        return virtual.config
    return peft_model.peft_config["default"]


def _peft_state(
    model: PreTrainedModel, peft_model: Any, own_state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the adapter's weights and `own_state` of the model, by peft's names."""
    from peft.utils import get_peft_model_state_dict

    virtual = soft_prompts.find_virtual_tokens(model)
    if virtual is not None:
        state = {f"base_model.{name}": values for name, values in own_state.items()}
        # The vectors, not the network that computes them: peft needs no more to use them.
        state[VIRTUAL_TOKEN_KEY] = virtual().detach()
        return state

    state = {f"base_model.model.{name}": values for name, values in own_state.items()}

    # Embeddings are excluded explicitly, because peft's default would query the hub.
    return state | get_peft_model_state_dict(peft_model, save_embedding_layers=False)


def _trained_model_weights(
    model: PreTrainedModel, section: TuningSection
) -> dict[str, torch.nn.Parameter]:
    """Return the model's own trained weights, with the other weights of their modules."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = set()
    for name, parameter in parameters.items():
        if parameter.requires_grad and not added_layers.is_added(name):
            modules.add(name.rpartition(".")[0])

    # peft stores whole modules, so a trained bias brings the frozen matrix of its layer along.
    trained = {
        name: parameter
        for name, parameter in parameters.items()
        if name.rpartition(".")[0] in modules
    }

    for name, parameter in trained.items():
        # peft's copy of a module would no longer share its matrix with another one; a copy of an
        # adapter's layer would hold the adapter too.
        tied = []
        for other, shared in parameters.items():
            if shared is parameter and other != name:
                tied.append(other)

        has_adapter = ".base_layer." in name
        if section.method != "bottleneck":
            has_adapter = has_adapter or _holds_added(model, name)
        if tied or has_adapter:
            reason = "it has an adapter itself"
            if tied:
                reason = f"it is one matrix with {tied[0]}"
            raise CheckpointError(
                f"--adapter: {tuning.name_in_model_files(name)} was trained too "
                f"(tuning.trainable), and peft cannot store it with an adapter: {reason}. Only "
                "weights that stand alone are allowed. Export without --adapter."
            )
    return trained


def _holds_added(model: PreTrainedModel, name: str) -> bool:
    """Whether the module of the weight `name` contains added weights."""
    module = model.get_submodule(name.rpartition(".")[0])
    return any(added_layers.is_added(inner) for inner, _ in module.named_parameters())


def load_adapter(
    model: PreTrainedModel, folder: str, section: TuningSection, task: TaskSection
) -> frozenset[str]:
    """Add the adapter in `folder` to its base model, merged where possible.

    Args:
        model: the base model, changed in place.
        folder: folder of the adapter.
        section: the method that added the weights.
        task: the adapter's task.

    Returns:
        Names of the model's own weights that were loaded.

    Raises:
        ModelError: the weights cannot be read, or the model has no place for one of them.
    """
    shown = f"model.path={folder}"
    with pretrained_model.loading_errors(shown, "adapter"):
        return _load_adapter(model, folder, section, task)


def _load_adapter(
    model: PreTrainedModel, folder: str, section: TuningSection, task: TaskSection
) -> frozenset[str]:
    """See `load_adapter`; raises any error of peft and torch."""
    from peft.utils import set_peft_model_state_dict

    # The seed does not matter: all initial values are overwritten.
    state = weight_files.load_weights(folder, WEIGHTS_FILE)
    own_flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    peft_model = tuning.apply_tuning(model, _section_to_load(section), 0, task)

    # First the model's own weights: peft, here without `modules_to_save`, has no place for them.
    parameters = dict(model.named_parameters())
    own_weights = {}
    for key in list(state):
        name = _model_weight_name(key, parameters)
        if name is not None:
            own_weights[name] = state.pop(key)

    with torch.no_grad():
        for name, values in own_weights.items():
            parameters[name].copy_(values)

        virtual = soft_prompts.find_virtual_tokens(model)
        if virtual is not None:
            weight: Any = virtual.encoder.embedding.weight  # type: ignore[union-attr]
            weight.copy_(state.pop(VIRTUAL_TOKEN_KEY))
        elif peft_model is not None:
            # peft does not raise an error for weights that have no place; it lists them.
            result: Any = set_peft_model_state_dict(peft_model, state)
            unexpected = result.unexpected_keys
            state = {name: state[name] for name in state if name in unexpected}

            # Merged, the model has the names and the speed of its base model.
            tuning.merge_adapters(model)

    # To add the layers froze the others. What a run trains is chosen by its own section, from a
    # model as any folder gives it: all weights trainable, except quantized ones.
    for parameter, is_trainable in own_flags:
        parameter.requires_grad_(is_trainable)

    # Whatever is left has not been loaded.
    if state:
        raise ModelError(
            f"model.path={folder}: {min(state)} has no place in the adapter's base model. The "
            "model it was trained with is needed. See base_model_name_or_path in "
            "adapter_config.json."
        )
    return frozenset(own_weights)


def _section_to_load(section: TuningSection) -> TuningSection:
    """Return the section that adds the modules the adapter's files hold weights for."""
    if section.method in PROMPT_METHODS:
        # The files hold the vectors, not the network that computed them.
        # So a prompt of P-tuning becomes one of prompt tuning.
        method = section.method
        prompt: dict[str, Any] = {"tokens": section.prompt.tokens}
        if method != "prefix_tuning":
            method = "prompt_tuning"
            prompt["init"] = "random"
        section = TuningSection.model_validate({"method": method, "prompt": prompt})

    # Nothing is trained here, and a pattern may name weights that this method does not add.
    return section.model_copy(update={"trainable": (), "frozen": ()})


def _model_weight_name(key: str, parameters: dict[str, Any]) -> str | None:
    """Return the model weight that `key` of an adapter's file names, None for an added one."""
    # peft's prefix for layers, its prefix for virtual tokens, and none for bottleneck adapters.
    for prefix in ("base_model.model.", "base_model.", ""):
        if key.startswith(prefix) and key.removeprefix(prefix) in parameters:
            return key.removeprefix(prefix)
    return None


def check_round_trip(
    model: PreTrainedModel,
    empty: PreTrainedModel,
    section: TuningSection,
    task: TaskSection,
    folder: Path,
) -> None:
    """Check that the adapter read from `folder` gives the logits of `model`.

    Trained weights come from the folder, read by `peft` where it supports the method.

    Args:
        model: the model that was written.
        empty: a model of the same shape with arbitrary weights; those that were not trained are
            copied from `model`.
        section: the tuning method.
        task: the adapter's task.
        folder: folder of the adapter.

    Raises:
        CheckpointError: the logits differ.
    """
    trained = {tuning.name_in_model_files(name) for name in _trained_model_weights(model, section)}
    values = {
        tuning.name_in_model_files(name): tensor
        for name, tensor in model.state_dict().items()
        if not added_layers.is_added(name)
    }

    with torch.no_grad():
        # Trained weights are zeroed, so that the check fails if the folder lacks one of them.
        for name, parameter in empty.named_parameters():
            if name in trained:
                parameter.zero_()
            else:
                parameter.copy_(values[name])
        for name, buffer in empty.named_buffers():
            if name in values:
                buffer.copy_(values[name])

        # By peft itself where it can, since that is how others will read the folder.
        loaded: Any
        if section.method == "bottleneck":
            load_adapter(empty, str(folder), section, task)
            loaded = empty
        else:
            loaded = pretrained_model.read_peft_adapter(empty, folder, str(folder))

        expected = probe_outputs(model, task, soft_prompts.find_virtual_tokens(model))
        outputs = probe_outputs(loaded.eval(), task, None)

    difference = float("inf")
    if expected.shape == outputs.shape:
        largest = expected.abs().max().item()
        difference = (expected - outputs).abs().max().item() / largest

    # Not `>`, which is false for NaN.
    if not difference <= MAX_RELATIVE_DIFFERENCE:
        raise CheckpointError(
            f"{folder}: the adapter read back does not give the same logits (relative difference "
            f"{difference:.1e}). Nothing was exported."
        )


def probe_outputs(
    model: Any, task: TaskSection, virtual: soft_prompts.VirtualTokens | None
) -> torch.Tensor:
    """Return, flat, the model's outputs for 12 token ids.

    `virtual` is None for peft's models, which prepend virtual tokens themselves.
    """
    vocab_size = model.config.get_text_config().vocab_size
    tokens = (torch.arange(12) * 7919 + 11)[None] % vocab_size  # (1, T)
    ids, mask = tokens, torch.ones_like(tokens)
    if virtual is not None:
        ids, mask = virtual.prepend(ids, mask)  # (1, P + T)

    kwargs = {}
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = tokens
    outputs = model(input_ids=ids, attention_mask=mask, **kwargs)

    # Heads of question answering have two outputs, models without a head only hidden states.
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in outputs:
            return outputs[name].float().flatten()  # type: ignore[no-any-return]
    raise AssertionError("a model without logits")
