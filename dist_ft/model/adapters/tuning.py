"""Which weights of a model are trained, and which are added to it.

The model is changed in place: names of its own layers, `forward` and loss stay the same. This
module adds the low-rank matrices and scales of `peft`; `soft_prompts` adds virtual tokens and
`bottleneck` adds bottleneck adapters. All random initial values depend on the run's seed alone, so
that every engine, number of workers and resumed run builds the same model. Loads no weights.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import MERGEABLE_METHODS, PROMPT_METHODS, TuningSection
from dist_ft.core.errors import ModelError
from dist_ft.model import heads
from dist_ft.model.adapters.added_layers import linear_layers
from dist_ft.model.model_task import model_task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger("dist_ft.model")
CAUSAL_LM = TaskSection()
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm")
"""Names of the final norm in known model families."""
NUM_NAMES_SHOWN = 3
"""Names of weights that an error message shows from each end of the model."""


def apply_tuning(
    model: PreTrainedModel,
    section: TuningSection,
    seed: int,
    task: TaskSection = CAUSAL_LM,
    text_ids: Sequence[int] = (),
) -> Any:
    """Freeze the weights that are not trained and add new ones, in place.

    Every method trains the head of the task, unless a pattern of tuning.frozen matches it.

    Args:
        model: the model, without added weights.
        section: the tuning method and its options.
        seed: seed of the initial values of added weights.
        task: the model's task.
        text_ids: token ids of tuning.prompt.text.

    Returns:
        The `PeftModel` that wraps `model`; None if the method adds no layers of peft.

    Raises:
        ModelError: the model has no target layer, a pattern matches no weight, or no weight would
            be trained.
    """
    # Before layers are added: whatever is new afterwards is an added weight.
    own = set(_parameters(model))
    head: set[str] = set()
    if model_task(task).has_head:
        head = {name for name in own if heads.is_head(name, model)}

    peft_model = _add_layers(model, section, seed, task, head, text_ids)
    if section.method == "full" and not section.frozen:
        return peft_model

    trained = own
    if section.method != "full":
        trained = _added_weights(model, own)
    trained |= head

    # Later steps win: a pattern of tuning.frozen also excludes what the others selected.
    if section.last_layers:
        trained |= _last_layers(model, section.last_layers)
    for pattern in section.trainable:
        trained |= _match_weights(model, pattern, "trainable")
    for pattern in section.frozen:
        trained -= _match_weights(model, pattern, "frozen")

    if not trained:
        raise ModelError(
            "tuning: no weight is trainable, because tuning.frozen matches all of them. Use fewer "
            "patterns in tuning.frozen."
        )

    for name, parameter in _parameters(model).items():
        parameter.requires_grad_(name in trained)
    return peft_model


def _add_layers(
    model: PreTrainedModel,
    section: TuningSection,
    seed: int,
    task: TaskSection,
    head: set[str],
    text_ids: Sequence[int],
) -> Any:
    """Add the weights of the tuning method; return the `PeftModel`, or None without one."""
    # AdaLoRA is one of the mergeable methods: its schedule comes on top of its layers.
    peft_model: Any = None
    if section.method in MERGEABLE_METHODS:
        peft_model = _add_peft_layers(model, section, seed, task, head)

    if section.method == "adalora":
        from dist_ft.model.adapters import adalora

        adalora.add_rank_schedule(model, peft_model.base_model)

    if section.method in PROMPT_METHODS:
        from dist_ft.model.adapters import soft_prompts

        soft_prompts.add_virtual_tokens(model, section, seed, task, text_ids)

    if section.method == "bottleneck":
        from dist_ft.model.adapters import bottleneck

        bottleneck.add_bottlenecks(model, section.bottleneck, seed)
    return peft_model


def _added_weights(model: PreTrainedModel, own: set[str]) -> set[str]:
    """Return the names of trainable weights that are not in `own`, the model's own weights."""
    added = set()
    for name, parameter in _parameters(model).items():
        # peft also adds weights that are not trained, such as AdaLoRA's `ranknum`.
        if name_in_model_files(name) not in own and parameter.requires_grad:
            added.add(name)
    return added


def name_in_model_files(name: str) -> str:
    """Return the name that a weight has in the model's own files.

    peft wraps a layer that gets an adapter: the original layer becomes its child `base_layer`.
    """
    return name.replace(".base_layer.", ".")


def merge_adapters(model: PreTrainedModel) -> None:
    """Merge all adapters into their base weights and unwrap the layers, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # A list, because the loop replaces modules.
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _add_peft_layers(
    model: PreTrainedModel, section: TuningSection, seed: int, task: TaskSection, head: set[str]
) -> Any:
    """Add peft's layers to `model`; return the `PeftModel` that wraps it."""
    import torch
    from peft import get_peft_model

    fork_rng, catch_warnings = torch.random.fork_rng(devices=[]), warnings.catch_warnings()
    with _peft_errors(model, section), fork_rng, catch_warnings:
        # peft warns about transposed layers, which it handles, and tied ones, checked below.
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        config = peft_config(section, task, head)
        # By default peft creates adapters of a 16-bit model in float32. The engines hold float32
        # masters for all trained weights anyway.
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)

    _check_adapted_layers(model, section)
    return peft_model


def _check_adapted_layers(model: PreTrainedModel, section: TuningSection) -> None:
    """Raise ModelError for a target that matches no layer, or an adapter on a tied weight."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    adapted = {}
    for name, parameter in parameters:
        if name_in_model_files(name) != name:
            adapted[name_in_model_files(name)] = parameter

    # To peft it is enough if one of several targets exists.
    layers = [name.rpartition(".")[0] for name in adapted]
    for target in target_layers(section):
        has_layer = any(f".{layer}".endswith(f".{target}") for layer in layers)
        if target != "all-linear" and not has_layer:
            raise ModelError(
                f"tuning.{section.method}.targets={list(target_layers(section))}: no layer is "
                f"named {target}. The model has {', '.join(linear_layers(model))}. Correct the "
                "name."
            )

    # Merging an adapter into a tied weight would also change the other layer.
    for name, parameter in adapted.items():
        for full_name, other in parameters:
            other_name = name_in_model_files(full_name)
            if other is parameter and other_name != name:
                raise ModelError(
                    f"tuning.{section.method}: {name} is tied to {other_name}, so that an adapter "
                    "on one of them cannot be merged. Targets must be untied layers. Use other "
                    f"names in tuning.{section.method}.targets."
                )


def target_layers(section: TuningSection) -> tuple[str, ...]:
    """Return the targets of LoRA or AdaLoRA in `section`; empty for other methods."""
    targets = {"lora": section.lora.targets, "adalora": section.adalora.targets}
    return targets.get(section.method, ())


def peft_config(
    section: TuningSection, task: TaskSection = CAUSAL_LM, head: Iterable[str] = ()
) -> Any:
    """Return peft's config for the method of `section`.

    Args:
        section: a tuning section whose method is lora, adalora or ia3.
        task: the model's task.
        head: names of the head's weights. Its layers are fully trained and get no adapter.
    """
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    task_type = model_task(task).adapter_type
    head_layers = {name.rpartition(".")[0] for name in head}
    excluded = sorted(head_layers) or None
    common: dict[str, Any] = {"task_type": task_type, "exclude_modules": excluded}
    if section.method == "ia3":
        return IA3Config(**common)

    # peft takes this name as a string only; in a list it would be the name of a layer.
    targets = target_layers(section)
    common["target_modules"] = list(targets)
    if targets == ("all-linear",):
        common["target_modules"] = "all-linear"

    if section.method == "adalora":
        ada = section.adalora
        return AdaLoraConfig(
            **common,
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
        **common,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
    )


@contextlib.contextmanager
def _peft_errors(model: PreTrainedModel, section: TuningSection) -> Iterator[None]:
    """Convert peft's errors about an unsupported model into a ModelError of one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        first_line = str(error).strip().split("\n")[0][:200]
        field, remedy = "tuning.method=ia3", "Use tuning.method=lora."
        if section.method != "ia3":
            field = f"tuning.{section.method}.targets={list(target_layers(section))}"
            remedy = f"Use linear layers of the model: {', '.join(linear_layers(model))}."
        raise ModelError(
            f"{field}: peft cannot add adapters to this model ({first_line}). {remedy}"
        ) from error


def _parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters())


def _match_weights(model: PreTrainedModel, pattern: str, field: str) -> set[str]:
    """Return the names of weights that match `pattern`; a tied weight has its first name.

    Raises:
        ModelError: no weight matches the pattern, which is given in tuning.<field>.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}

    # Against all names of a weight: a pattern may match a tied weight by its second name only.
    first_name_by_match = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if fnmatchcase(name_in_model_files(name), pattern):
            first_name_by_match[name] = first_names[id(parameter)]

    if not first_name_by_match:
        shown = ", ".join(_first_and_last(first_names.values()))
        raise ModelError(
            f"tuning.{field}={pattern}: no weight matches this pattern. The model has "
            f"{shown}. Use a pattern such as *.layers.0.*."
        )
    for name, first_name in first_name_by_match.items():
        if name != first_name:
            log.info(
                "tuning.%s=%s: %s is tied to %s; they are trained or frozen together",
                field,
                pattern,
                name,
                first_name,
            )
    return set(first_name_by_match.values())


def _first_and_last(names: Iterable[str]) -> list[str]:
    """Return the first and last `NUM_NAMES_SHOWN` of `names`, as in the model's files."""
    names = [name_in_model_files(name) for name in names]
    if len(names) <= 2 * NUM_NAMES_SHOWN:
        return names
    return [*names[:NUM_NAMES_SHOWN], "...", *names[-NUM_NAMES_SHOWN:]]


def _last_layers(model: PreTrainedModel, num_layers: int) -> set[str]:
    """Return the names of weights of the last layers, the final norm and an untied output layer."""
    prefix, layers = _find_layers(model)
    if num_layers > len(layers):
        raise ModelError(
            f"tuning.last_layers={num_layers}: the model has {len(layers)} layers. Use at most "
            f"{len(layers)}."
        )
    first = len(layers) - num_layers
    last_prefixes = tuple(f"{prefix}.{index}." for index in range(first, len(layers)))

    # By identity, because modules are found here and weights are selected by full names.
    after_layers = {id(parameter) for parameter in _final_norm(model, prefix).parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        # A tied output layer is also the input embedding, which stays frozen.
        after_layers |= {id(parameter) for parameter in head.parameters()}
    return {
        name
        for name, parameter in _parameters(model).items()
        if name.startswith(last_prefixes) or id(parameter) in after_layers
    }


def _final_norm(model: PreTrainedModel, layers_name: str) -> torch.nn.Module:
    """Return the norm with the same parent as the layers `layers_name`, or an empty module."""
    from torch import nn

    parent = model.get_submodule(layers_name.rpartition(".")[0])
    norms = {}
    for name, module in parent.named_children():
        if "norm" in type(module).__name__.lower():
            norms[name] = module

    # Some models have others there, for example a norm of the embeddings.
    if len(norms) > 1:
        norms = {name: norm for name, norm in norms.items() if name in FINAL_NORMS}
        if len(norms) != 1:
            raise ModelError(
                f"tuning.last_layers: the final norm of a {model.config.model_type} model "
                "cannot be located. Use tuning.trainable with name patterns."
            )
    return next(iter(norms.values()), nn.Module())


class _Layers(NamedTuple):
    """The transformer layers of a model.

    Attributes:
        name: dotted name of the list in the model.
        layers: the list, a `ModuleList`.
    """

    name: str
    layers: Any


def _find_layers(model: PreTrainedModel) -> _Layers:
    """Return the first list of modules with one module per layer; ModelError if none exists."""
    from torch import nn

    config = model.config.get_text_config()
    if not config.is_encoder_decoder:
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
                return _Layers(name, module)
    raise ModelError(
        f"tuning.last_layers: the layers of a {model.config.model_type} model cannot be located. "
        "Use tuning.trainable with name patterns."
    )
