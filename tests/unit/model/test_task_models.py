"""Models with heads: outputs ignore padding; the loss is that of transformers, summed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tasks
import torch
from torch.nn import functional

from dist_ft.config.schema import DataSection, ModelSection, TaskSection
from dist_ft.data.batch import IGNORE_INDEX, Batch, empty_batch
from dist_ft.data.batching.assemble import assemble_batch
from dist_ft.data.encoding.answer_spans import last_tokens
from dist_ft.data.encoding.make_encoder import (
    make_encoder,
)
from dist_ft.data.encoding.task_encoder import (
    TaskEncoder,
)
from dist_ft.model.loading.load import load_task_model
from dist_ft.model.task_models import SpecialTokens, TaskModel
from dist_ft.model.trainable_model import parameters_by_name

TOKENIZER = tiny_tasks.make_tokenizer()
LABELS = {
    "sequence_classification": ["a", "b", "c"],
    "multi_label": [f"l{i}" for i in range(33)],
    "token_classification": ["O", "B-x"],
}
ROWS = {
    "sequence_classification": [
        {"text": "the fox", "label": "b"},
        {"text": "seven wise owls watch old rivers", "label": "c"},
    ],
    "multi_label": [
        {"text": "the fox runs", "label": ["l1", "l32"]},
        {"text": "seven wise owls watch", "label": []},
    ],
    "regression": [
        {"text": "the fox", "label": 0.5},
        {"text": "seven wise owls watch old rivers", "label": -2},
    ],
    "token_classification": [
        {"tokens": ["the", "fox"], "tags": ["O", "B-x"]},
        {"tokens": ["seven", "wise", "owls", "watch"], "tags": ["O", "O", "B-x", "O"]},
    ],
    "question_answering": [
        {
            "question": "who",
            "context": "the fox runs",
            "answers": {"text": ["fox"], "answer_start": [4]},
        },
        {
            "question": "who runs",
            "context": "seven wise owls",
            "answers": {"text": [], "answer_start": []},
        },
    ],
    "seq2seq": [
        {"source": "the fox", "target": "old owls watch"},
        {"source": "seven wise owls", "target": "tea"},
    ],
    "masked_lm": [{"text": "the fox"}, {"text": "seven wise owls watch old rivers"}],
    "embedding": [
        {"text": "the fox", "positive": "old stones and tea"},
        {"text": "seven wise owls watch", "positive": "tea"},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tasks.base(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=list(ROWS))
def case(request, folder):
    """(name, module in evaluation, the batch of all rows, the batches of each)."""
    task = TaskSection.model_validate(
        {"name": request.param, "labels": LABELS.get(request.param, ()), "stride": 8}
    )
    model, _ = load_task_model(
        task,
        ModelSection(
            path=str(folder / ("bart" if task.name == "seq2seq" else "bert")), dtype="float32"
        ),
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(
            torch.randn_like(parameter) * 0.05
        )  # so that every weight has an effect, heads included
    module = TaskModel(model, task, SpecialTokens.from_tokenizer(TOKENIZER, model.config)).eval()
    rows = ROWS[request.param]
    return request.param, module, batch(task, rows), [batch(task, [row]) for row in rows]


def batch(task: TaskSection, rows) -> Batch:
    encoder = make_encoder(TOKENIZER, DataSection(train="x"), task, 40)
    assert isinstance(encoder, TaskEncoder)
    found = encoder.encode(rows, "x")
    sizes = np.diff(found.offsets)
    segments = np.stack(
        [np.arange(len(rows)), np.zeros(len(rows), int), sizes, np.zeros(len(rows), int)], 1
    )
    return assemble_batch(
        found.tokens, found.targets, segments, np.repeat(np.arange(len(rows)), 1), 0
    )


def run(module: TaskModel, one: Batch):
    with torch.no_grad():
        return module(**module.prepare_inputs(one, "cpu"), return_outputs=True)


def test_outputs_do_not_depend_on_padding(case):
    name, module, whole, alone = case
    losses, outputs = zip(*(run(module, one) for one in alone), strict=True)
    loss, output = run(module, whole)
    if name != "embedding":  # whose loss is of rows among each other
        assert torch.allclose(loss, sum(losses), atol=1e-5)
    for row, own in enumerate(outputs):
        sized = (
            output[row, : own.shape[1]]
            if name in ("token_classification", "question_answering", "masked_lm", "seq2seq")
            else output[row]
        )
        assert torch.allclose(sized.float(), own[0].float(), atol=1e-5), row


def test_empty_batch_gives_zero_gradients(case):
    _, module, _, _ = case
    module.zero_grad()
    loss = module(**module.prepare_inputs(empty_batch(), "cpu"))
    loss.backward()
    assert loss.item() == 0
    for name, parameter in parameters_by_name(module).items():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_every_weight_gets_a_gradient(case):
    _, module, whole, _ = case
    module.zero_grad()
    module(**module.prepare_inputs(whole, "cpu")).backward()
    assert [
        name for name, parameter in parameters_by_name(module).items() if parameter.grad is None
    ] == []


def test_loss_equals_transformers(case):
    name, module, whole, alone = case
    if name == "question_answering":
        whole = alone[0]  # transformers lets answers lie in the padding
    given = module.prepare_inputs(whole, "cpu")
    loss, _ = run(module, whole)
    if name in ("multi_label", "regression", "embedding"):
        return  # below
    inputs = {"input_ids": given["ids"], "attention_mask": given["mask"]}
    if name != "seq2seq":
        inputs["token_type_ids"] = types(given["ids"], given["mask"])
    labels = given["labels"]
    with torch.no_grad():
        if name == "question_answering":
            marked = labels != IGNORE_INDEX
            start = marked.long().argmax(1)
            expected = module.model(
                **inputs,
                start_positions=start,
                end_positions=last_tokens(labels.gather(1, start[:, None])[:, 0]),
            ).loss
        elif name == "sequence_classification":
            expected = module.model(**inputs, labels=labels[:, 0]).loss * 2
        else:
            expected = module.model(**inputs, labels=labels).loss * (labels != IGNORE_INDEX).sum()
    assert torch.allclose(loss, expected, atol=1e-4)


def types(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(ids)
    for row, own in enumerate(ids):
        at = (own == TOKENIZER.sep_token_id).nonzero()[0, 0]
        found[row, at + 1 :] = 1
    return found * mask


def test_multi_label_and_regression_losses(case):
    name, module, whole, _ = case
    loss, output = run(module, whole)
    if name == "multi_label":
        bits = torch.zeros(2, 33)
        bits[0, [1, 32]] = 1
        expected = (
            functional.binary_cross_entropy_with_logits(output, bits, reduction="none")
            .mean(-1)
            .sum()
            * 2
        )
        assert torch.allclose(loss, expected, atol=1e-5), (
            "twice: with 33 labels a row has two labeled positions"
        )
        assert whole.num_target_tokens == 4
    if name == "regression":
        assert torch.allclose(loss, ((output - torch.tensor([0.5, -2.0])) ** 2).sum(), atol=1e-5)
    if name == "embedding":
        assert output.shape == (2, 2, 32)
        assert whole.num_target_tokens == 2


def test_pairs_have_token_types(folder):
    task = TaskSection.model_validate(
        {"name": "sequence_classification", "labels": ["a", "b"], "columns": {"pair": "pair"}}
    )
    model, _ = load_task_model(task, ModelSection(path=str(folder / "bert"), dtype="float32"))
    module = TaskModel(model, task, SpecialTokens.from_tokenizer(TOKENIZER, model.config)).eval()
    rows = [
        {"text": "the fox", "pair": "old owls", "label": "a"},
        {"text": "tea", "pair": "bread and tea", "label": "b"},
    ]
    encoded = TOKENIZER(
        [row["text"] for row in rows],
        [row["pair"] for row in rows],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        assert torch.allclose(run(module, batch(task, rows))[1], model(**encoded).logits, atol=1e-5)


def test_noise_applies_in_training_and_is_bounded_by_row_length(folder):
    task = TaskSection.model_validate(
        {"name": "sequence_classification", "labels": ["a", "b", "c"]}
    )
    model, _ = load_task_model(task, ModelSection(path=str(folder / "bert"), dtype="float32"))
    seen = {}
    module = TaskModel(
        model, task, SpecialTokens.from_tokenizer(TOKENIZER, model.config), neftune_alpha=5.0
    )
    model.get_input_embeddings().register_forward_hook(
        lambda _m, _a, out: seen.update(out=out.detach())
    )
    one = batch(task, ROWS["sequence_classification"])
    run(module.eval(), one)
    plain = seen["out"]
    run(module.train(), one)
    sizes = module.prepare_inputs(one, "cpu")["mask"].sum(1)
    noise = (seen["out"] - plain).abs().amax((1, 2))
    assert (noise <= 5.0 / (sizes * 32) ** 0.5 + 1e-6).all() and (
        noise > 2.0 / (sizes * 32) ** 0.5
    ).all()
