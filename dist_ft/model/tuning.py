"""Which weights of a model learn, and which are added to it: full, partial, LoRA, IA3.

Adapters are those of `peft`, put into the model itself: its names, its forward and its loss stay what they were. Every
engine, world and resumed run builds the same: what is added is drawn from the run's seed. Does not load weights.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dist_ft.config.tuning import TuningSection
from dist_ft.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("dist_ft.model")
ADDED = ("lora", "ia3")
"""Methods that add weights."""
SHOWN = 3


def apply(model: PreTrainedModel, section: TuningSection, seed: int) -> Any:
    """Freeze what does not learn and add what is new, in place; return peft's model around it, None where none is.

    Raises ModelError if the model has no such layers, or a pattern names none of its weights.
    """
    around = _add(model, section, seed) if section.method in ADDED else None
    if section.method == "full" and not section.frozen:
        return around
    parameters = _by_name(model)
    learns = set(parameters) if section.method == "full" else {name for name in parameters if is_added(name)}
    if section.last_layers:
        learns |= _last_layers(model, section.last_layers)
    for field in ("trainable", "frozen"):
        for pattern in getattr(section, field):
            found = _matching(model, pattern, field)
            learns = learns | found if field == "trainable" else learns - found
    if not learns:
        raise ModelError("tuning: no weight learns; tuning.frozen leaves none; give fewer patterns")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in learns)
    return around


def is_added(name: str) -> bool:
    """Tell whether a weight of this name is an adapter's, of which a model's own files know nothing."""
    return any(part.startswith(("lora_", "ia3_")) for part in name.split("."))


def name_in_files(name: str) -> str:
    """Return what the model's own files call a weight (a layer that got an adapter has moved one level down)."""
    return name.replace(".base_layer.", ".")


def merge(model: PreTrainedModel) -> None:
    """Add adapters into the weights they stand beside, and take them out of the model, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _add(model: PreTrainedModel, section: TuningSection, seed: int) -> Any:
    import torch
    from peft import get_peft_model

    with _explained(section), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a layer is transposed: peft sees to it
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config(section), autocast_adapter_dtype=False)


def peft_config(section: TuningSection) -> Any:
    """Return what peft calls the method of `section`."""
    from peft import IA3Config, LoraConfig

    if section.method == "ia3":
        return IA3Config(task_type="CAUSAL_LM")
    lora = section.lora
    targets: Any = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    return LoraConfig(task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha,  # type: ignore[arg-type]
                      lora_dropout=lora.dropout, target_modules=targets, use_rslora=lora.rslora, use_dora=lora.dora)


@contextlib.contextmanager
def _explained(section: TuningSection) -> Iterator[None]:
    """Turn what peft raises for a model it can not change into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0][:200]
        field = f"tuning.lora.targets={list(section.lora.targets)}" if section.method == "lora" else "tuning.method=ia3"
        raise ModelError(f"{field}: this model can not get such adapters ({first}); name linear layers it has, or "
                         "choose another tuning.method") from error


def _by_name(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters())


def _matching(model: PreTrainedModel, pattern: str, field: str) -> set[str]:
    """Return the weights `pattern` names, those that are tied under the first of their names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)
             if fnmatchcase(name_in_files(name), pattern)}
    if not found:
        raise ModelError(f"tuning.{field}={pattern}: no weight has such a name; there are "
                         f"{', '.join(_examples(first.values()))}; give a pattern such as *.layers.0.*")
    for name, shared in found.items():
        if name != shared:
            log.info("tuning.%s=%s: %s is one matrix with %s; it learns, or does not, in both places", field, pattern,
                     name, shared)
    return set(found.values())


def _examples(names: Iterable[str]) -> list[str]:
    found = [name_in_files(name) for name in names]
    return [*found[:SHOWN], "...", *found[-SHOWN:]] if len(found) > 2 * SHOWN else found


def _last_layers(model: PreTrainedModel, count: int) -> set[str]:
    """Return the weights of the last `count` layers and of what comes after all layers."""
    prefix, layers = _layers(model)
    if count > len(layers):
        raise ModelError(f"tuning.last_layers={count}: the model has {len(layers)} layers; give at most as many")
    names = list(_by_name(model))
    chosen = tuple(f"{prefix}.{index}." for index in range(len(layers) - count, len(layers)))
    last = max(index for index, name in enumerate(names) if name.startswith(f"{prefix}."))
    embedded = {id(model.get_input_embeddings().weight)}  # a tied output layer is the input's too: it stays
    parameters = _by_name(model)
    return {name for index, name in enumerate(names)
            if name.startswith(chosen) or (index > last and id(parameters[name]) not in embedded)}


def _layers(model: PreTrainedModel) -> tuple[str, Any]:
    """Return name and list of the model's layers."""
    from torch import nn

    config = model.config.get_text_config()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ModelError(f"tuning.last_layers: where a {model.config.model_type} model keeps its layers is not known; use "
                     "tuning.trainable with patterns of names")
