"""Agreement with Transformers' BertForPreTraining: logits, losses, every gradient, fifty steps of training."""

import dataclasses

import pytest
import torch
from bert_cases import MICRO, padded_examples, randomised, with_slack
from oracle import DEVICE, assert_as_good_as_torch, relative_error

from fusebert.model import BertConfig, from_hf, pack_padded
from fusebert.model.hf import parameter_names

transformers = pytest.importorskip("transformers")


def random_hf(config: BertConfig = MICRO):
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**dataclasses.asdict(config)))
    return randomised(model)


def pair_of_models(dtype: torch.dtype = torch.float32, config: BertConfig = MICRO):
    hf = random_hf(config)
    return hf.to(DEVICE, dtype), from_hf(hf).to(DEVICE, dtype)


def mean_loss(model, batch):
    """Transformers' loss: the mean over the masked tokens plus the mean over the pairs."""
    out = model(batch)
    return out.mlm_loss_sum / batch.num_masked + out.nsp_loss_sum / batch.num_pairs


def gradients(hf, ours, examples):
    """{our name: (our gradient, theirs)} of the loss on the same examples, packed with slack and padded."""
    mean_loss(ours, with_slack(pack_padded(**examples), 9, 2, 3)).backward()
    hf(**examples).loss.backward()
    theirs = dict(hf.named_parameters())
    return {
        name: (
            parameter.grad,
            torch.cat([theirs[part].grad for part in parameter_names(MICRO.num_hidden_layers)[name]]),
        )
        for name, parameter in ours.named_parameters()
    }


def test_logits_of_a_ragged_batch():
    hf, ours = (model.eval() for model in pair_of_models())
    examples = padded_examples(MICRO, device=DEVICE)
    batch = with_slack(pack_padded(**examples), tokens=11, segments=2, masked=3)
    with torch.no_grad():
        theirs = hf(examples["input_ids"], examples["attention_mask"], examples["token_type_ids"])
        hidden = ours.encode(batch)
        mlm = ours.predict_tokens(hidden)[: batch.num_tokens]
        nsp = ours.nsp_logits(ours.pool(hidden[batch.cu_seqlens[: len(examples["input_ids"])]]))
    assert relative_error(mlm, theirs.prediction_logits[examples["attention_mask"].bool()]) <= 1e-5
    assert relative_error(nsp, theirs.seq_relationship_logits) <= 1e-5


def test_counts_of_correct_predictions():
    hf, ours = (model.eval() for model in pair_of_models())
    examples = padded_examples(MICRO, device=DEVICE)
    with torch.no_grad():
        theirs = hf(examples["input_ids"], examples["attention_mask"], examples["token_type_ids"])
        # Half of the labels become the model's predictions, so that there is something to count.
        best = theirs.prediction_logits.argmax(-1)
        labels = examples["labels"]
        every_other = torch.arange(labels.numel(), device=DEVICE).reshape(labels.shape) % 2 == 0
        examples["labels"] = torch.where((labels >= 0) & every_other, best, labels)
        out = ours(with_slack(pack_padded(**examples), 9, 2, 3))
    assert out.mlm_correct == (best == examples["labels"]).sum() > 5
    assert out.nsp_correct == (theirs.seq_relationship_logits.argmax(-1) == examples["next_sentence_label"]).sum()


def test_every_gradient_in_float64():
    """Without rounding, packed and padded agree to the last digits for every parameter."""
    hf, ours = pair_of_models(torch.float64)
    examples = padded_examples(MICRO, device=DEVICE)
    assert relative_error(mean_loss(ours, pack_padded(**examples)), hf(**examples).loss) < 1e-14
    for name, (our_grad, their_grad) in gradients(hf, ours, examples).items():
        assert their_grad.norm() > 1e-4, f"{name}: no gradient to compare"
        assert relative_error(our_grad, their_grad) < 1e-12, name


def assert_gradients_as_good(found):
    """``found``: for each batch {name: (ours, float64, Transformers')}. Batches are stacked because the error of one
    small tensor is chance."""
    for name in found[0]:
        ours, oracle, theirs = (torch.stack([grads[name][i] for grads in found]) for i in range(3))
        assert_as_good_as_torch(ours, oracle, theirs, name)


def test_loss_and_every_gradient_in_float32():
    found = []
    for seed in range(3):
        examples = padded_examples(MICRO, seed=seed, device=DEVICE)
        hf, ours = pair_of_models()
        assert relative_error(mean_loss(ours, pack_padded(**examples)), hf(**examples).loss) < 1e-6
        oracle = gradients(*pair_of_models(torch.float64), examples)
        pairs = gradients(hf, ours, examples)
        found.append({name: (pair[0], oracle[name][1], pair[1]) for name, pair in pairs.items()})
    assert_gradients_as_good(found)


def test_gradients_under_bfloat16_autocast():
    """Each parameter's gradient is as near to float64 as Transformers' in bfloat16.

    Transformers' model is bfloat16 throughout: under autocast it would keep the residual stream in float32, ours does
    not. The parameters are bfloat16 numbers, so that all three models have the same.
    """
    found = []
    for examples in (padded_examples(MICRO, seed=seed, device=DEVICE) for seed in range(3)):
        hf = random_hf().to(DEVICE, torch.bfloat16)
        ours = from_hf(hf).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            mean_loss(ours, with_slack(pack_padded(**examples), 9, 2, 3)).backward()
        theirs = {
            name: pair[1] for name, pair in gradients(hf, from_hf(hf).to(DEVICE, torch.bfloat16), examples).items()
        }
        hf.zero_grad()
        oracle = gradients(hf.double(), from_hf(hf).to(DEVICE, torch.float64), examples)
        found.append({name: (p.grad, oracle[name][1], theirs[name].float()) for name, p in ours.named_parameters()})
    assert_gradients_as_good(found)


def test_padding_token_gets_gradients_from_the_decoder_only():
    """As with Transformers' padding_idx: none where the padding token is the input, all where it is the label."""
    hf, ours = pair_of_models(torch.float64)
    examples = padded_examples(MICRO, device=DEVICE)
    pad = MICRO.pad_token_id
    ours_row, theirs_row = (
        grad[pad] for grad in gradients(hf, ours, examples)["encoder.embeddings.word_embeddings.weight"]
    )
    assert relative_error(ours_row, theirs_row) < 1e-12
    assert theirs_row.norm() > 0


def test_a_batch_without_pairs_has_no_next_sentence_loss():
    _, ours = pair_of_models()
    batch = pack_padded(**{**padded_examples(MICRO, device=DEVICE), "next_sentence_label": None})
    out = ours(batch)
    (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    assert out.nsp_loss_sum == 0
    assert out.nsp_correct == 0
    assert ours.nsp_classifier.weight.grad.norm() == 0


def test_a_batch_without_labels_has_zero_loss_and_gradients():
    _, ours = pair_of_models()
    batch = pack_padded(padded_examples(MICRO, device=DEVICE)["input_ids"])
    out = ours(with_slack(batch, 3, 1, 2))
    (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    assert out.mlm_loss_sum == 0
    assert all(parameter.grad.norm() == 0 for parameter in ours.parameters())


def test_loss_curve_of_fifty_steps():
    """Same initialisation, same batches, dropout 0, AdamW with BERT's decay groups: the same loss at every step."""
    config = BertConfig.preset("tiny", 300, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    hf = transformers.BertForPreTraining(transformers.BertConfig(**dataclasses.asdict(config))).to(DEVICE).train()
    ours = from_hf(hf).to(DEVICE).train()
    lengths = (32, 9, 20, 27, 14, 30)
    batches = [padded_examples(config, lengths, seed, DEVICE) for seed in range(5)]

    def optimizer(model):
        decayed = [p for p in model.parameters() if p.ndim > 1]
        undecayed = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": undecayed, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-3, eps=1e-6)

    def train(model, loss_of):
        adamw, losses = optimizer(model), []
        for step in range(50):
            loss = loss_of(model, batches[step % len(batches)])
            adamw.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    their_losses = train(hf, lambda model, examples: model(**examples).loss)
    our_losses = train(ours, lambda model, examples: mean_loss(model, with_slack(pack_padded(**examples), 5, 1, 2)))
    difference = ((our_losses - their_losses) / their_losses).abs()
    assert difference.max() < 1e-3, f"step {difference.argmax()}: {difference.max():.3g}"
    assert their_losses[-5:].mean() < 0.9 * their_losses[:5].mean(), "the loss does not fall: the test shows nothing"
