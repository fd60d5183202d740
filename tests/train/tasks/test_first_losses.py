"""Without dropout, the losses of a task's first steps are those of Transformers' model, trained by a plain loop."""

import itertools
from pathlib import Path

import pytest
import torch
from hf_families import DROPOUTS, TEXT
from task_examples import CLASSES, TASKS, examples_of, model_of

from fusebert.model.batch import IGNORE
from fusebert.model.hf.encoders import open_encoder
from fusebert.model.text_batch import TextBatch
from fusebert.train.step.optim import learning_rate, make_optimizer
from fusebert.train.step.step import TrainingStep
from fusebert.train.tasks.examples import EpochBatches

transformers = pytest.importorskip("transformers", minversion="5")
STEPS, PAD = 20, 1
NAMES = {"classify": "SequenceClassification", "tag": "TokenClassification", "qa": "QuestionAnswering"}


def padded(parts: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)


def backward_of_theirs(task: str, model: torch.nn.Module, window: list[TextBatch]) -> float:
    """Their loss of a step; adds to the gradients."""
    bounds = [list(itertools.pairwise(batch.cu_seqlens.tolist())) for batch in window]
    texts = [batch.input_ids[i:j] for batch, own in zip(window, bounds, strict=True) for i, j in own]
    if task == "qa":
        # Their softmax is over the padding too: each text alone has none.
        answers = torch.cat([batch.labels for batch in window])
        losses = []
        for text, (start, end) in zip(texts, answers, strict=True):
            loss = model(text[None], start_positions=start[None], end_positions=end[None]).loss / len(texts)
            loss.backward()
            losses.append(float(loss.detach()))
        return sum(losses)
    if task == "tag":
        parts = [batch.labels[i:j] for batch, own in zip(window, bounds, strict=True) for i, j in own]
        labels = padded(parts, IGNORE)
    else:
        labels = torch.cat([batch.labels for batch in window])
    ids = padded(texts, PAD)
    loss = model(ids, (ids != PAD).long(), labels=labels).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_transformers_in_the_first_20_steps(task: str, family: str, tmp_path: Path) -> None:
    kind = getattr(transformers, f"{family}For{NAMES[task]}")
    torch.manual_seed(0)
    outputs = {} if task == "qa" else {"num_labels": len(CLASSES)}
    theirs = kind(kind.config_class(**TEXT, **dict.fromkeys(DROPOUTS, 0.0), **outputs, pad_token_id=PAD)).train()
    theirs.save_pretrained(tmp_path)
    examples = examples_of(task, 70, TEXT["vocab_size"])
    ours, notes = model_of(task, open_encoder(tmp_path))
    assert notes == []
    ours.train()
    step = TrainingStep(ours, make_optimizer(ours, 1e-3, 0.01), clip=1.0, compute_dtype=torch.float32, losses=1)
    optimizer = make_optimizer(theirs, 1e-3, 0.01)
    epochs = EpochBatches(examples, 8, 100, seed=0, epochs=3, static=False)
    windows = list(itertools.islice(itertools.chain.from_iterable(map(epochs.epoch, range(3))), STEPS))
    assert sum(len(window) > 1 for window in windows) > 5  # steps of several micro-batches
    for i, window in enumerate(windows):
        lr = learning_rate(1e-3, (i + 0.5) / 27, 0.1)
        loss = float(step(window, lr).sums[0]) / sum(batch.num_labels for batch in window)
        expected = backward_of_theirs(task, theirs, window)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert loss == pytest.approx(expected, rel=1e-4), i
