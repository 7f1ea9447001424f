"""Contradictions about what a run learns: its task, its method, and what only some of them use."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.checks import regularizers
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections import decoding, prompting, robustness
from dist_ft.config.sections.task import LABELLED, METRICS
from dist_ft.config.sections.tuning import PROMPTS

USED_BY = {
    "labels": LABELLED,
    "new_head": LABELLED,
    "grow_head": LABELLED,
    "class_weights": ("sequence_classification", "token_classification"),
    "focal_gamma": LABELLED,
    "stride": ("question_answering",),
    "mask_probability": ("masked_lm",),
    "temperature": ("embedding",),
    "pooling": ("embedding",),
}
"""Fields of the task section and the tasks that use them."""
LONGEST_WINDOW = 16384
"""Tokens whose places fit into the labels of question_answering (`data.spans`)."""
SECTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "adalora": ("adalora",),
    "bottleneck": ("bottleneck",),
    "prompt": PROMPTS,
}
"""Parts of the tuning section and the methods that use them."""
SMOOTHED = ("causal_lm", "sequence_classification", "token_classification", "seq2seq", "masked_lm")


def _tuning(config: RunConfig) -> Iterator[str]:
    tuning = config.tuning
    if tuning.method == "partial" and not tuning.last_layers and not tuning.trainable:
        yield (
            "tuning.method=partial: it does not say what learns; needs tuning.last_layers or tuning.trainable; set "
            "one, or tuning.method=full"
        )
    if tuning.last_layers and tuning.method != "partial":
        yield (
            f"tuning.last_layers={tuning.last_layers}: tuning.method={tuning.method} does not use it; allowed with "
            f"tuning.method=partial; set that, or remove it"
        )
    if tuning.trainable and tuning.method == "full":
        yield (
            "tuning.trainable: with tuning.method=full all weights learn; allowed with all other methods; set "
            "tuning.method=partial, or remove it"
        )
    for name in ("lora", "adalora", "bottleneck"):
        targets = getattr(tuning, name).targets
        for whole in {"all-linear", "auto"} & set(targets) if len(targets) > 1 else ():
            yield (
                f"tuning.{name}.targets={list(targets)}: {whole} stands for a list of its own; allowed alone; "
                f"remove it, or the others"
            )
    if config.zero.offload_param == "nvme" and (tuning.method != "full" or tuning.frozen):
        yield (
            "zero.offload_param=nvme: weights that do not learn can not be read back from there (tuning); allowed "
            "where all learn; set zero.offload_param=cpu"
        )
    for name, methods in SECTIONS.items():
        section = getattr(tuning, name)
        if tuning.method not in methods and section != type(section)():
            yield (
                f"tuning.{name}: tuning.method={tuning.method} does not use it; allowed with tuning.method="
                f"{' or '.join(methods)}; set that, or remove it"
            )


def _prompts(config: RunConfig) -> Iterator[str]:
    tuning, prompt = config.tuning, config.tuning.prompt
    if tuning.method not in PROMPTS:
        return
    method = f"tuning.method={tuning.method}"
    if config.task.name == "masked_lm":
        yield (
            f"{method}: peft has no virtual tokens for task.name=masked_lm; allowed with all other tasks; set "
            f"tuning.method=lora"
        )
    if config.prompting.method != "none" or config.task.objective != "likelihood":
        yield (
            f"{method}: virtual tokens are for training by likelihood, with a head or of texts; allowed with "
            f"prompting.method=none and task.objective=likelihood; set those, or tuning.method=lora"
        )
    if tuning.method == "prefix_tuning" and config.reading.pack:
        yield (
            f"{method}: samples packed into one sequence would share one prefix; allowed with data.pack=false; set "
            f"that, or tuning.method=prompt_tuning"
        )
    if tuning.method == "prefix_tuning" and (
        config.model.activation_checkpointing or config.model.attention.startswith("flash")
    ):
        yield (
            f"{method}: the prefix lies in the cache, which model.activation_checkpointing and flash attention do "
            f"without; allowed with sdpa and eager; set model.attention=sdpa, model.activation_checkpointing=false"
        )
    if (prompt.init == "text") != (prompt.text is not None):
        yield (
            f"tuning.prompt.init={prompt.init}: tuning.prompt.text is what init=text begins with; allowed together; "
            f"set both, or none"
        )
    used = {"init": "prompt_tuning", "projection": "prefix_tuning"}
    for name, only in used.items():
        if (
            tuning.method != only
            and getattr(prompt, name) != type(prompt).model_fields[name].default
        ):
            yield f"tuning.prompt.{name}: {method} does not use it; allowed with tuning.method={only}; remove it"
    if prompt.hidden_size and (
        tuning.method == "prompt_tuning"
        or (tuning.method == "prefix_tuning" and not prompt.projection)
    ):
        yield (
            f"tuning.prompt.hidden_size={prompt.hidden_size}: {method} has no network here; allowed with p_tuning, "
            f"and prefix_tuning with tuning.prompt.projection; remove it"
        )
    if tuning.unfreeze_steps or tuning.layer_decay < 1:
        yield (
            f"{method}: virtual tokens lie in no layer, so tuning.layer_decay and tuning.unfreeze_steps mean "
            f"nothing; allowed with methods that teach layers; remove them"
        )


def _adalora(config: RunConfig) -> Iterator[str]:
    ada = config.tuning.adalora
    if config.tuning.method != "adalora":
        return
    if ada.end_step <= ada.begin_step:
        yield (
            f"tuning.adalora.end_step={ada.end_step}: ranks are dealt between tuning.adalora.begin_step="
            f"{ada.begin_step} and this step; a later one is needed; set it, below the steps of the run"
        )
    if ada.rank >= ada.initial_rank:
        yield (
            f"tuning.adalora.rank={ada.rank}: nothing would be taken away from tuning.adalora.initial_rank="
            f"{ada.initial_rank}; less is allowed; lower it"
        )
    if config.prompting.method != "none" or config.task.objective != "likelihood":
        yield (
            "tuning.method=adalora: its penalty is for training by likelihood, with a head or of texts; allowed "
            "with prompting.method=none and task.objective=likelihood; set those, or tuning.method=lora"
        )
    if config.max_workers and config.zero.stage:
        yield (
            f"zero.stage={config.zero.stage}: tuning.method=adalora weighs whole gradients, which ZeRO-1 to 3 take "
            f"apart; allowed with zero.stage=0 and in one process; set zero.stage=0, or tuning.method=lora"
        )
    if config.model.dtype != "float32":
        yield (
            f"model.dtype={config.model.dtype}: tuning.method=adalora weighs float32 gradients of the weights "
            f"themselves; allowed with float32; set that, or tuning.method=lora"
        )


def _task(config: RunConfig) -> Iterator[str]:
    task = config.task
    unused = [
        field
        for field, tasks in USED_BY.items()
        if task.name not in tasks and getattr(task, field) != type(task).model_fields[field].default
    ]
    for field in unused:
        yield (
            f"task.{field}: task.name={task.name} does not use it; only {', '.join(USED_BY[field])} do; remove "
            f"it, or set task.name"
        )
    if task.grow_head and task.new_head:
        yield (
            "task.grow_head: task.new_head begins another head, which has nothing to keep; one of them is allowed; "
            "remove the other"
        )
    if len(set(task.labels)) < len(task.labels):
        twice = next(label for label in task.labels if task.labels.count(label) > 1)
        yield f"task.labels: {twice} stands there twice; each label once is allowed; remove one"
    if len(task.labels) == 1:
        yield (
            f"task.labels=[{task.labels[0]}]: there is nothing to choose among; at least two are needed; name the "
            f"others"
        )
    if task.name != "causal_lm" and (
        config.data.format != "auto" or config.data.fields != type(config.data.fields)()
    ):
        yield (
            f"data.format={config.data.format}: with task.name={task.name} columns are those of task.columns; "
            f"allowed with task.name=causal_lm; remove it and data.fields"
        )
    if config.tuning.neftune_alpha and task.name == "seq2seq":
        yield (
            f"tuning.neftune_alpha={config.tuning.neftune_alpha}: task.name=seq2seq does not use it (source and "
            f"target share their embeddings); all other tasks do; remove it"
        )
    if config.tuning.label_smoothing and task.name not in SMOOTHED:
        yield (
            f"tuning.label_smoothing={config.tuning.label_smoothing}: the loss of task.name={task.name} has no "
            f"probabilities of labels to smooth; allowed with {', '.join(SMOOTHED)}; remove it"
        )


def _metric(config: RunConfig) -> Iterator[str]:
    texts = config.evaluation.text_metrics if config.evaluation.decoding.max_new_tokens else ()
    metric, known = config.checkpoint.best_by, ("loss", *METRICS[config.task.name], *texts)
    if metric not in known:
        yield (
            f"checkpoint.best_by={metric}: evaluations of task.name={config.task.name} have no such metric; "
            f"allowed: {', '.join(known)}; name one of them"
        )


def _texts(config: RunConfig) -> Iterator[str]:
    section = config.evaluation
    yield from decoding.contradictions(section.decoding, "evaluation.decoding")
    if not section.decoding.max_new_tokens:
        for field in decoding.TextsSection.model_fields:
            value = getattr(section, field)
            if field != "decoding" and value != type(section).model_fields[field].default:
                yield (
                    f"evaluation.{field}={value}: no texts are made; needs evaluation.decoding.max_new_tokens; set "
                    f"that, or remove it"
                )
        return
    if config.task.name not in decoding.MAKERS:
        yield (
            f"evaluation.decoding.max_new_tokens={section.decoding.max_new_tokens}: models of task.name="
            f"{config.task.name} make no texts; allowed with {' and '.join(decoding.MAKERS)}; set it to 0"
        )
    if not section.data:
        yield (
            f"evaluation.decoding.max_new_tokens={section.decoding.max_new_tokens}: there are no prompts; needs "
            f"evaluation.data; set it"
        )


def _risk(config: RunConfig) -> Iterator[str]:
    task = config.task
    if task.objective != "minimum_risk":
        if task.risk != type(task.risk)():
            yield (
                f"task.risk: task.objective={task.objective} does not use it; allowed with minimum_risk; set that, "
                f"or remove it"
            )
        return
    if task.name not in decoding.MAKERS:
        yield (
            f"task.objective=minimum_risk: models of task.name={task.name} make no texts; allowed with "
            f"{' and '.join(decoding.MAKERS)}; remove it"
        )
    if task.name == "causal_lm" and config.data.pack:
        yield (
            "task.objective=minimum_risk: a row holds a prompt and one text; packed samples are not; set "
            "data.pack=false"
        )
    if config.tuning.label_smoothing:
        yield (
            f"tuning.label_smoothing={config.tuning.label_smoothing}: task.objective=minimum_risk does not use it; "
            f"allowed with likelihood; remove it"
        )


def _task_sizes(config: RunConfig) -> Iterator[str]:
    task, batch = config.task, config.batch
    if task.name == "embedding" and batch.micro_batch < 2:
        yield (
            f"batch.micro_batch={batch.micro_batch}: task.name=embedding tells each text from the others of its "
            f"micro-batch; at least 2 are needed, more are better; raise it"
        )
    if task.name == "question_answering" and batch.sequence_length > LONGEST_WINDOW:
        yield (
            f"batch.sequence_length={batch.sequence_length}: windows of task.name=question_answering have at most "
            f"{LONGEST_WINDOW} tokens; longer contexts become several; lower it"
        )
    if task.name == "question_answering" and task.stride >= batch.sequence_length // 2:
        yield (
            f"task.stride={task.stride}: windows of batch.sequence_length={batch.sequence_length} can not share so "
            f"many tokens; less than half is allowed; lower it"
        )


def _prompting(config: RunConfig) -> Iterator[str]:
    yield from prompting.problems(config.task, config.prompting)
    yield from robustness.problems(config.task, config.evaluation.robustness)


CHECKS = (
    _tuning,
    _prompts,
    _adalora,
    _task,
    _metric,
    _texts,
    _risk,
    _task_sizes,
    _prompting,
    *regularizers.CHECKS,
)
"""Each from a config to a line for each contradiction."""
