"""Classification of texts: encoding, loss, metrics, answers."""

import math

import pytest
import torch
from torch import nn

from federated.adapters import load_base, null_model
from federated.config import ModelConfig, TaskConfig
from federated.errors import DataError, ModelError
from federated.tasks import make_task
from federated.tasks.classification import macro_f1

LABELS = ("no", "yes", "perhaps")
CONFIG = TaskConfig(labels=LABELS, max_length=16)
ROWS = [{"text": "word " * (1 + index % 5) + str(index), "label": index % 3} for index in range(11)]


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig(source="tiny:bert"))


@pytest.fixture(scope="module")
def task(base):
    return make_task(CONFIG, base.tokenizer)


@pytest.fixture
def model(base):
    return null_model(base, CONFIG, seed=4)


class Fixed(nn.Module):
    """Answers the same logits for every row."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, attention_mask):
        return self.logits.expand(len(input_ids), -1)


def test_texts_are_cut_to_the_longest_length(task):
    (features,) = task.encode([{"text": "x" * 100, "label": 0}])
    assert len(features["input_ids"]) == 16


def test_a_batch_is_padded_to_its_own_longest(task):
    batch = task.collate(task.encode([{"text": "abc", "label": 2}, {"text": "a", "label": 0}]))
    assert batch["input_ids"].shape == (2, 3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]


def test_an_empty_text_is_a_row_like_any_other(task, model):
    features = task.encode([{"text": "", "label": 1}])
    assert torch.isfinite(task.per_sample_loss(model, task.collate(features))).all()


def test_the_loss_is_the_cross_entropy_of_each_row(task):
    batch = task.collate(task.encode(ROWS[:3]))
    losses = task.per_sample_loss(Fixed([0.0, 1.0, 2.0]), batch)
    total = math.log(1 + math.e + math.e**2)
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([total, total - 1, total - 2])


def test_the_loss_of_a_row_does_not_depend_on_its_neighbours(task, model):
    features = task.encode(ROWS)
    together = task.per_sample_loss(model, task.collate(features))
    alone = torch.cat([task.per_sample_loss(model, task.collate([one])) for one in features])
    torch.testing.assert_close(together, alone)


def test_evaluation_counts_what_is_right(task):
    rows = [{"text": "a", "label": label} for label in (1, 1, 1, 0)]
    found = task.evaluate(Fixed([0.0, 5.0, 0.0]), task.encode(rows), batch_size=3)
    assert found.num_examples == 4
    assert found.metrics == {"accuracy": 0.75, "macro_f1": pytest.approx((6 / 7 + 0) / 2)}


def test_the_evaluation_s_loss_is_the_mean_over_rows(task, model):
    features = task.encode(ROWS)
    losses = task.per_sample_loss(model, task.collate(features))
    assert task.evaluate(model, features, batch_size=4).loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_evaluation_does_not_depend_on_order(task, model):
    features = task.encode(ROWS)
    shuffled = [*features[3:], *features[:3]][::-1]
    assert task.evaluate(model, features, batch_size=4) == task.evaluate(model, shuffled, batch_size=4)


def test_evaluation_leaves_no_gradient_and_eval_mode(task, model):
    model.train()
    model.classifier.requires_grad_(True)
    task.evaluate(model, task.encode(ROWS), batch_size=4)
    assert not model.training
    assert model.classifier.weight.grad is None


def test_an_evaluation_becomes_one_flat_record(task, model):
    record = task.evaluate(model, task.encode(ROWS), batch_size=4).to_dict()
    assert set(record) == {"loss", "num_examples", "accuracy", "macro_f1"}


def test_answers_come_in_the_order_of_the_rows(task, model):
    texts = [{"text": "word " * length} for length in (9, 1, 4)]
    together = [answer.probability for answer in task.predict(model, texts)]
    alone = [task.predict(model, [row])[0].probability for row in texts]
    assert together == pytest.approx(alone, rel=1e-5)


def test_an_answer_has_a_probability_for_every_label(task):
    (answer,) = task.predict(Fixed([0.0, 3.0, 1.0]), [{"text": "hm"}])
    assert answer.label == "yes"
    assert answer.probability == max(answer.scores.values()) == answer.scores["yes"]
    assert sum(answer.scores.values()) == pytest.approx(1.0)


def test_a_model_with_another_number_of_classes_is_named(task):
    with pytest.raises(ModelError, match="2 classes, the task 3 labels"):
        task.predict(Fixed([0.0, 1.0]), [{"text": "hm"}])


def test_no_rows_are_refused(task):
    with pytest.raises(DataError, match="no rows"):
        task.encode([])


def test_no_features_are_refused(task, model):
    with pytest.raises(DataError, match="no examples to evaluate on"):
        task.evaluate(model, [], batch_size=4)


@pytest.mark.parametrize("label", [3, -1, None, "yes", 1.0, True])
def test_an_unknown_label_names_the_row_and_the_labels(task, label):
    with pytest.raises(DataError, match=r"row 2: label is not an index from 0 to 2 into \['no', 'yes', 'perhaps'\]"):
        task.encode([ROWS[0], {"text": "my secret", "label": label}])


@pytest.mark.parametrize("row", [{"label": 0}, {"text": None, "label": 0}, {"text": 7, "label": 0}])
def test_a_row_without_a_text_is_named(task, row):
    with pytest.raises(DataError, match=r"row 1: found .* under 'text', expected a string"):
        task.encode([row])


def test_a_task_for_text_needs_a_tokenizer():
    with pytest.raises(ModelError, match="task sequence_classification needs a tokenizer"):
        make_task(CONFIG)


def test_macro_f1_counts_only_classes_that_occur():
    assert macro_f1([0, 0, 1], [0, 0, 1]) == 1.0
    assert macro_f1([0, 0], [1, 1]) == 0.0
