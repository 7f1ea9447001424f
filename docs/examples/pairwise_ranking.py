"""A task of your own: pairwise ranking, which trains a reward model (Bradley and Terry, 1952)."""

import numpy as np
from torch.nn.functional import logsigmoid

from dist_ft import IGNORE_INDEX, LossAndOutputs, RowResult, Sample, Task, TaskScores


class PairwiseRanking(Task):
    """Score the chosen text of a row above the rejected one."""

    auto_class = "AutoModelForSequenceClassification"
    head_outputs = ("score",)
    has_head = True
    keeps_texts_apart = True
    metrics = ("accuracy",)

    def read(self, row, location):
        chosen = self.read_text(row, "chosen", location)
        return Sample(chosen, self.read_text(row, "rejected", location))

    def compute_loss(self, model, inputs):
        chosen = model.run_model(inputs.ids, inputs.mask).logits[:, 0]  # (rows,)
        rejected = model.run_model(inputs.second_ids, inputs.second_mask).logits[:, 0]
        is_counted = (inputs.labels != IGNORE_INDEX).any(1)
        losses = -logsigmoid(chosen - rejected)
        return LossAndOutputs((losses * is_counted).sum(), chosen - rejected)

    def read_output(self, labels, output):
        return RowResult(None, float(output))

    def compute_scores(self, expected, predicted):
        return TaskScores({"accuracy": float(np.mean(np.array(predicted) > 0))})

    def predict(self, model, rows):
        for (score,) in model.logits([row["text"] for row in rows]).tolist():
            yield {"score": score}
