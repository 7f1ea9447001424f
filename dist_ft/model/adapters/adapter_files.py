"""What a run added to a model, and learned besides, as a folder of its own: written for `peft`, and read back.

Weights of the model itself that learned (a new head, norms) are peft's `modules_to_save`. Bottleneck adapters, which
peft does not know, lie under their own names and are read by dist_ft only. Guarantees: a folder is left only if what is
read from it gives the logits of what was written. Does not hold the model beside which the adapter stands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dist_ft.config.load import load_stored_section
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import PROMPTS, TuningSection
from dist_ft.core.errors import CheckpointError, ModelError
from dist_ft.model.adapters import added_layers, soft_prompts, tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INFO_FILE = "dist_ft.json"
"""File of an exported folder: task, attention, prompt template and sequence length of the run; of an adapter, more."""
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RELATIVE_DIFFERENCE = 1e-4
"""How far logits of what was read may be from those of what was written, relative to the largest."""


def read_adapter_info(folder: str) -> dict[str, Any] | None:
    """Return what an adapter's folder says of itself, None if the folder holds no adapter."""
    path = Path(folder) / INFO_FILE
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found if "tuning" in found else None


def save_adapter(
    model: PreTrainedModel,
    around: Any,
    section: TuningSection,
    base: tuple[str, str | None],
    folder: Path,
) -> None:
    """Write what learned in `model` to `folder`; `around`: peft's model around it, or None; `base`: path, revision.

    Raises CheckpointError for weights peft has no way to keep beside an adapter.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    besides = _besides(model, section)
    state = {name: parameter.detach() for name, parameter in besides.items()}
    if section.method == "bottleneck":
        state |= {
            name: found.detach()
            for name, found in model.named_parameters()
            if added_layers.is_added(name)
        }
    else:
        from peft.utils import get_peft_model_state_dict

        virtual = soft_prompts.find_virtual_tokens(model)
        prefix = "base_model." if virtual is not None else "base_model.model."
        state = {f"{prefix}{name}": values for name, values in state.items()}
        if virtual is not None:
            config, state["prompt_embeddings"] = virtual.config, virtual().detach()
        else:
            config = around.peft_config["default"]
            state |= get_peft_model_state_dict(
                around, save_embedding_layers=False
            )  # to find out, it would ask the hub
        config.modules_to_save = sorted({name.rpartition(".")[0] for name in besides}) or None
        config.base_model_name_or_path, config.revision = base
        config.inference_mode = True
        config.save_pretrained(folder)
    model.config.save_pretrained(folder)
    save_file(
        {name: values.contiguous().clone() for name, values in state.items()}, folder / WEIGHTS_FILE
    )


def _besides(model: PreTrainedModel, section: TuningSection) -> dict[str, torch.nn.Parameter]:
    """Return the model's own weights that learned, with the rest of the modules they belong to."""
    named = dict(model.named_parameters(remove_duplicate=False))
    modules = {
        name.rpartition(".")[0]
        for name, found in named.items()
        if found.requires_grad and not added_layers.is_added(name)
    }
    found = {
        name: parameter for name, parameter in named.items() if name.rpartition(".")[0] in modules
    }
    for name, parameter in found.items():
        shared = [other for other, there in named.items() if there is parameter and other != name]
        if (
            ".base_layer." in name
            or shared
            or (section.method != "bottleneck" and _holds_added(model, name))
        ):
            why = f"it is one matrix with {shared[0]}" if shared else "it has an adapter itself"
            raise CheckpointError(
                f"--adapter: {tuning.name_in_model_files(name)} learned too (tuning.trainable), and peft "
                f"can not keep it beside an adapter, as {why}; allowed for weights that stand alone; "
                "export it without --adapter"
            )
    return found


def _holds_added(model: PreTrainedModel, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return any(added_layers.is_added(inner) for inner, _ in module.named_parameters())


def load_adapter(
    model: PreTrainedModel, folder: str, said: dict[str, Any], task: TaskSection
) -> frozenset[str]:
    """Put the adapter in `folder` into the `model` it belongs to, merged where it can be; return what it filled.

    Args:
        model: as it was before.
        folder: of the adapter.
        said: what the folder says of itself (`about`).
        task: which the adapter does.
    """
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    section = load_stored_section(said, "tuning", TuningSection, folder)
    if section.method in PROMPTS:  # the vectors were kept, and not the network that made them
        kind = "prefix_tuning" if section.method == "prefix_tuning" else "prompt_tuning"
        section = TuningSection.model_validate(
            {
                "method": kind,
                "prompt": {
                    "tokens": section.prompt.tokens,
                    **({} if kind == "prefix_tuning" else {"init": "random"}),
                },
            }
        )
    section = section.model_copy(update={"trainable": (), "frozen": ()})
    around = tuning.apply_tuning(model, section, 0, task)
    state = load_file(Path(folder) / WEIGHTS_FILE)
    named = dict(model.named_parameters())
    own = {
        name: state.pop(key) for key in list(state) if (name := _own_name(key, named)) is not None
    }
    with torch.no_grad():
        for name, values in own.items():
            named[name].copy_(values)
        virtual = soft_prompts.find_virtual_tokens(model)
        if virtual is not None:
            virtual.encoder.embedding.weight.copy_(state.pop("prompt_embeddings"))  # type: ignore[union-attr, operator]
        elif around is not None:
            loaded: Any = set_peft_model_state_dict(around, state)
            left = loaded.unexpected_keys
            state = {name: state[name] for name in state if name in left}
            tuning.merge_adapters(model)
    if state:
        raise ModelError(
            f"model.path={folder}: {min(state)} has no place in the model the adapter belongs to; the "
            "model it was trained with is needed; see base_model_name_or_path in adapter_config.json"
        )
    return frozenset(own)


def _own_name(key: str, named: dict[str, Any]) -> str | None:
    """Return the name of a weight of the model itself by its key in an adapter's file, None for an adapter's."""
    for prefix in ("base_model.model.", "base_model.", ""):
        if key.startswith(prefix) and key.removeprefix(prefix) in named:
            return key.removeprefix(prefix)
    return None


def check_round_trip(
    model: PreTrainedModel,
    empty: PreTrainedModel,
    section: TuningSection,
    task: TaskSection,
    folder: Path,
) -> None:
    """Raise CheckpointError unless the adapter read from `folder` gives the logits of `model`.

    `empty` is a model of the same shape with arbitrary weights; those that did not learn are taken from `model`. What
    learned comes from the folder, by `peft` where it knows the method.
    """
    learned = {tuning.name_in_model_files(name) for name in _besides(model, section)}
    values = {
        tuning.name_in_model_files(name): found
        for name, found in model.state_dict().items()
        if not added_layers.is_added(name)
    }
    with torch.no_grad():
        for name, parameter in empty.named_parameters():
            parameter.zero_() if name in learned else parameter.copy_(values[name])
        for name, buffer in empty.named_buffers():
            if name in values:
                buffer.copy_(values[name])
        if section.method == "bottleneck":
            load_adapter(empty, str(folder), {"tuning": section.model_dump(mode="json")}, task)
            twin: Any = empty
        else:
            from peft import PeftModel

            twin = PeftModel.from_pretrained(empty, str(folder))
        want, got = _told(model, task, soft_prompts.find_virtual_tokens(model)), _told(twin.eval(), task, None)
    worst = (
        (want - got).abs().max().item() / want.abs().max().item()
        if want.shape == got.shape
        else float("inf")
    )
    if not worst <= MAX_RELATIVE_DIFFERENCE:
        raise CheckpointError(
            f"{folder}: read again the adapter does not give the same logits (relative difference "
            f"{worst:.1e}); nothing was exported"
        )


def _told(
    model: Any, task: TaskSection, virtual: soft_prompts.VirtualTokens | None
) -> torch.Tensor:
    """Return, flat, what a model tells of 12 token ids; peft's puts virtual tokens before them itself."""
    tokens = (torch.arange(12) * 7919 + 11)[None] % model.config.get_text_config().vocab_size
    ids, mask = tokens, torch.ones_like(tokens)
    if virtual is not None:
        ids, mask = virtual.before(ids, mask)
    given = {"decoder_input_ids": tokens} if task.name == "seq2seq" else {}
    told = model(input_ids=ids, attention_mask=mask, **given)
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in told:
            return told[name].float().flatten()  # type: ignore[no-any-return]
    raise AssertionError("a model without logits")
