"""Which weights of a model learn, and which are added to it.

What is added is put into the model itself: its names, its forward and its loss stay what they were. Low-rank matrices
and scales are those of `peft`, here; virtual tokens (`prompts`) and networks behind layers (`bottleneck`) have modules
of their own. Every engine, world and resumed run builds the same: all is drawn from the run's seed. Does not load
weights.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import MERGED, PROMPTS, TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.model import heads
from dist_ft.model.adapters.added_layers import linear_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("dist_ft.model")
CAUSAL_LM = TaskSection()
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")
NUM_EXAMPLES = 3


def apply_tuning(
    model: PreTrainedModel,
    section: TuningSection,
    seed: int,
    task: TaskSection = CAUSAL_LM,
    text_ids: Sequence[int] = (),
) -> Any:
    """Freeze what does not learn and add what is new, in place; return peft's model around it, None where none is.

    `text_ids` are the tokens of tuning.prompt.text. A head of the task's own learns with every method, unless `frozen`
    names it. Raises ModelError if the model has no such layers, or a pattern names none of its weights.
    """
    own = set(_by_name(model))
    head = (
        {name for name in own if heads.is_head(name, model)} if task.name in heads.TASKS_WITH_HEAD else set()
    )
    around = _add(model, section, seed, task, head) if section.method in MERGED else None
    if section.method == "adalora":
        from dist_ft.model.adapters import adalora

        adalora.add_rank_schedule(model, around.base_model)  # type: ignore[union-attr]
    if section.method in PROMPTS:
        from dist_ft.model.adapters import soft_prompts

        soft_prompts.add_virtual_tokens(model, section, seed, task, text_ids)
    if section.method == "bottleneck":
        from dist_ft.model.adapters import bottleneck

        bottleneck.add_bottlenecks(model, section.bottleneck, seed)
    if section.method == "full" and not section.frozen:
        return around
    parameters = _by_name(model)
    learns = (
        own
        if section.method == "full"
        else {
            name
            for name, found in parameters.items()
            if name_in_model_files(name) not in own and found.requires_grad
        }
    )
    learns |= head
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


def name_in_model_files(name: str) -> str:
    """Return what the model's own files call a weight (a layer that got an adapter has moved one level down)."""
    return name.replace(".base_layer.", ".")


def merge_adapters(model: PreTrainedModel) -> None:
    """Add adapters into the weights they stand beside, and take them out of the model, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _add(
    model: PreTrainedModel, section: TuningSection, seed: int, task: TaskSection, head: set[str]
) -> Any:
    import torch
    from peft import get_peft_model

    with _explained(model, section), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # that a layer is transposed (peft sees to it), or tied (below)
        torch.default_generator.manual_seed(seed)
        around = get_peft_model(
            model, peft_config(section, task, head), autocast_adapter_dtype=False
        )
    _require_sound(model, section)
    return around


def _require_sound(model: PreTrainedModel, section: TuningSection) -> None:
    """Raise ModelError for a target nothing has the name of, and for an adapter on a matrix used in two places."""
    every = [
        (name_in_model_files(name), name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    adapted = {name: parameter for name, now, parameter in every if now != name}
    layers = [name.rpartition(".")[0] for name in adapted]
    for target in target_layers(section):
        if target != "all-linear" and not any(
            f".{layer}".endswith(f".{target}") for layer in layers
        ):
            raise ModelError(
                f"tuning.{section.method}.targets={list(target_layers(section))}: no layer is called {target}; "
                f"there are {', '.join(linear_layers(model))}; correct it"
            )
    for name, parameter in adapted.items():
        other = next(
            (other for other, _, shared in every if shared is parameter and other != name), None
        )
        if other is not None:
            raise ModelError(
                f"tuning.{section.method}: {name} is one matrix with {other}, and what is learned beside "
                "one of them can not be added to both; give other targets"
            )


def target_layers(section: TuningSection) -> tuple[str, ...]:
    """Return which layers `section` gives matrices to."""
    return {"lora": section.lora.targets, "adalora": section.adalora.targets}.get(
        section.method, ()
    )


def peft_config(
    section: TuningSection, task: TaskSection = CAUSAL_LM, head: Iterable[str] = ()
) -> Any:
    """Return what peft calls the method of `section`; the weights of a `head` get no adapter, they learn themselves."""
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    kind = {"causal_lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(task.name)
    apart = sorted({name.rpartition(".")[0] for name in head}) or None
    given: dict[str, Any] = {"task_type": kind, "exclude_modules": apart}
    if section.method == "ia3":
        return IA3Config(**given)
    given["target_modules"] = (
        "all-linear" if target_layers(section) == ("all-linear",) else list(target_layers(section))
    )
    if section.method == "adalora":
        ada = section.adalora
        return AdaLoraConfig(
            **given,
            lora_alpha=ada.alpha,  # type: ignore[arg-type]
            init_r=ada.initial_rank,
            target_r=ada.rank,
            lora_dropout=ada.dropout,
            tinit=ada.begin_step,
            tfinal=0,
            total_step=ada.end_step,
            deltaT=ada.every_steps,
            orth_reg_weight=ada.orthogonality,
        )
    lora = section.lora
    return LoraConfig(
        **given,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


@contextlib.contextmanager
def _explained(model: PreTrainedModel, section: TuningSection) -> Iterator[None]:
    """Turn what peft raises for a model it can not change into one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0][:200]
        field, remedy = "tuning.method=ia3", "use tuning.method=lora"
        if section.method != "ia3":
            field = f"tuning.{section.method}.targets={list(target_layers(section))}"
            remedy = f"name linear layers it has: {', '.join(linear_layers(model))}"
        raise ModelError(
            f"{field}: this model can not get such adapters ({first}); {remedy}"
        ) from error


def _by_name(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters())


def _matching(model: PreTrainedModel, pattern: str, field: str) -> set[str]:
    """Return the weights `pattern` names, those that are tied under the first of their names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if fnmatchcase(name_in_model_files(name), pattern)
    }
    if not found:
        raise ModelError(
            f"tuning.{field}={pattern}: no weight has such a name; there are "
            f"{', '.join(_examples(first.values()))}; give a pattern such as *.layers.0.*"
        )
    for name, shared in found.items():
        if name != shared:
            log.info(
                "tuning.%s=%s: %s is one matrix with %s; it learns, or does not, in both places",
                field,
                pattern,
                name,
                shared,
            )
    return set(found.values())


def _examples(names: Iterable[str]) -> list[str]:
    found = [name_in_model_files(name) for name in names]
    return [*found[:NUM_EXAMPLES], "...", *found[-NUM_EXAMPLES:]] if len(found) > 2 * NUM_EXAMPLES else found


def _last_layers(model: PreTrainedModel, count: int) -> set[str]:
    """Return the weights of the last `count` layers and of what comes after all layers."""
    prefix, layers = _layers(model)
    if count > len(layers):
        raise ModelError(
            f"tuning.last_layers={count}: the model has {len(layers)} layers; give at most as many"
        )
    chosen = tuple(f"{prefix}.{index}." for index in range(len(layers) - count, len(layers)))
    beside = model.get_submodule(prefix.rpartition(".")[0])
    norms = {
        name: norm
        for name, norm in beside.named_children()
        if "norm" in type(norm).__name__.lower()
    }
    if len(norms) > 1:
        norms = {name: norm for name, norm in norms.items() if name in FINAL_NORMS}
        if len(norms) != 1:
            raise ModelError(
                f"tuning.last_layers: which norm of a {model.config.model_type} model is its last is not "
                "known; use tuning.trainable with patterns of names"
            )
    parameters = _by_name(model)
    after = {id(parameter) for norm in norms.values() for parameter in norm.parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if (
        head is not None and head.weight is not embedding.weight
    ):  # a tied one is the input's too: it stays
        after |= {id(parameter) for parameter in head.parameters()}
    return {
        name
        for name, parameter in parameters.items()
        if name.startswith(chosen) or id(parameter) in after
    }


def _layers(model: PreTrainedModel) -> tuple[str, Any]:
    """Return name and list of the model's layers."""
    from torch import nn

    config = model.config.get_text_config()
    for name, module in model.named_modules() if not config.is_encoder_decoder else ():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ModelError(
        f"tuning.last_layers: where a {model.config.model_type} model keeps its layers is not known; use "
        "tuning.trainable with patterns of names"
    )
