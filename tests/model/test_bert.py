"""The packed encoder: initialisation, isolation of segments, dropout, precision, compilation, the Triton path."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from bert_cases import MICRO, padded_examples, with_slack
from bert_cases import bert as cpu_bert
from oracle import DEVICE, assert_as_good_as_torch, relative_error

from fusebert.kernels import use_backend
from fusebert.model import IGNORE, BertConfig, BertEncoder, BertForPreTraining, pack_padded

DROPOUT = dataclasses.replace(MICRO, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture(scope="module")
def batch():
    return with_slack(pack_padded(**padded_examples(MICRO)), tokens=11, segments=2, masked=3).to(DEVICE)


def bert(config: BertConfig = MICRO, seed: int = 0) -> BertForPreTraining:
    return cpu_bert(config, seed).to(DEVICE)


def loss_and_gradients(model, batch):
    """(mlm_loss_sum + nsp_loss_sum, {name: gradient})."""
    model.zero_grad()
    out = model(batch)
    loss = out.mlm_loss_sum + out.nsp_loss_sum
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_initialisation_is_berts():
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig.preset("tiny", 2000))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            rows = parameter[1:] if name.endswith("word_embeddings.weight") else parameter
            assert 0.017 < rows.std() < 0.023, name
        else:
            assert parameter.unique().tolist() == [1.0 if name.endswith("norm.weight") else 0.0], name
    assert not model.decoder_weight[0].any()
    assert model.decoder_weight is model.encoder.embeddings.word_embeddings.weight


def test_manual_seed_governs_the_initialisation():
    first, second, other = bert(seed=1), bert(seed=1), bert(seed=2)
    assert torch.equal(first.mlm_dense.weight, second.mlm_dense.weight)
    assert not torch.equal(first.mlm_dense.weight, other.mlm_dense.weight)


def test_slack_and_spare_slots_change_nothing(batch):
    """Other slack tokens give bitwise the same results; no slack gives the same results up to rounding."""
    model = bert()
    loss, gradients = loss_and_gradients(model, batch)
    slack = slice(batch.num_tokens, None)
    other = dataclasses.replace(batch, input_ids=batch.input_ids.clone(), token_type_ids=batch.token_type_ids.clone())
    other.input_ids[slack] = (other.input_ids[slack] + 7) % MICRO.vocab_size
    other.token_type_ids[slack] = 1 - other.token_type_ids[slack]
    other_loss, other_gradients = loss_and_gradients(model, other)
    assert torch.equal(model(other).mlm_correct, model(batch).mlm_correct)
    assert torch.equal(loss, other_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name

    bare = pack_padded(**padded_examples(MICRO)).to(DEVICE)
    bare_loss, bare_gradients = loss_and_gradients(model, bare)
    assert relative_error(loss, bare_loss) < 1e-6
    for name, gradient in gradients.items():
        assert relative_error(gradient, bare_gradients[name]) < 1e-5, name


def test_a_segment_sees_no_other(batch):
    model = bert().eval()
    changed = dataclasses.replace(batch, input_ids=batch.input_ids.clone())
    start, end = batch.cu_seqlens[2], batch.cu_seqlens[3]
    changed.input_ids[start:end] = (changed.input_ids[start:end] + 1) % MICRO.vocab_size
    with torch.no_grad():
        before, after = model.encode(batch), model.encode(changed)
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:])
    assert not torch.isclose(before[start:end], after[start:end]).all(-1).any()


def test_no_gradient_crosses_segments(batch):
    model = bert(dataclasses.replace(MICRO, num_hidden_layers=1)).eval()
    embedded = []
    model.encoder.embeddings.register_forward_hook(lambda module, inputs, output: embedded.append(output))
    start, end = batch.cu_seqlens[2], batch.cu_seqlens[3]
    out = model.encode(batch)[start:end].square().sum()
    touched = torch.autograd.grad(out, embedded)[0].abs().sum(-1) > 0
    assert touched[start:end].all()
    assert touched.sum() == end - start


def test_the_last_layer_on_the_rows_that_are_read_is_the_whole_layer(batch):
    """Losses and every gradient, in float64, against the encoder's full output."""
    model = bert().double().eval()
    out = model(batch)
    read = torch.autograd.grad(out.mlm_loss_sum + out.nsp_loss_sum, list(model.parameters()))

    hidden = model.encode(batch)
    labelled = batch.masked_labels != IGNORE
    logits = model.predict_tokens(hidden[batch.masked_positions[labelled]])
    mlm_loss = F.cross_entropy(logits, batch.masked_labels[labelled], reduction="sum")
    nsp_logits = model.nsp_logits(model.pool(hidden[batch.cu_seqlens[:-1].clamp(max=len(hidden) - 1)]))
    nsp_loss = F.cross_entropy(nsp_logits, batch.nsp_labels, ignore_index=IGNORE, reduction="sum")
    full = torch.autograd.grad(mlm_loss + nsp_loss, list(model.parameters()))

    torch.testing.assert_close(out.mlm_loss_sum, mlm_loss)
    torch.testing.assert_close(out.nsp_loss_sum, nsp_loss)
    for (name, _), a, b in zip(model.named_parameters(), read, full, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_segments_longer_than_the_positions_are_refused(batch):
    with pytest.raises(ValueError, match="max_seqlen is 41, but the model has positions for 40"):
        bert()(dataclasses.replace(batch, max_seqlen=41))


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_drops_in_training_alone_and_obeys_the_seed(batch, field):
    model = bert(dataclasses.replace(MICRO, **{field: 0.1}))
    reference = bert().eval()  # the same parameters, without dropout

    def encode(model, seed):
        torch.manual_seed(seed)
        return model.encode(batch).detach()

    trained = encode(model.train(), 1)
    assert torch.equal(trained, encode(model, 1))
    assert not torch.equal(trained, encode(model, 2))
    assert not torch.equal(trained, encode(reference, 1))
    assert torch.equal(encode(model.eval(), 1), encode(reference, 1))


def test_dropout_is_unbiased_at_the_embeddings(batch):
    """Dropped with probability p, and the rest scaled by 1 / (1 − p)."""
    embeddings = bert(DROPOUT).encoder.embeddings
    inputs = (batch.input_ids, batch.token_type_ids, batch.position_ids)
    kept, whole = embeddings.train()(*inputs), embeddings.eval()(*inputs)
    dropped = kept == 0
    assert 0.07 < dropped.float().mean() < 0.13
    torch.testing.assert_close(kept[~dropped], whole[~dropped] / 0.9)


def test_autocast_runs_in_bfloat16_with_float32_losses_and_gradients(batch):
    model = bert()
    seen = {}
    for name, module in model.named_modules():
        if name in ("encoder.embeddings", "encoder.layers.0", "encoder.layers.1", "mlm_norm"):
            module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: output.dtype}))
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, gradients = loss_and_gradients(model, batch)
    assert seen == dict.fromkeys(
        ("encoder.embeddings", "encoder.layers.0", "encoder.layers.1", "mlm_norm"), torch.bfloat16
    )
    assert loss.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_can_be_half_precision_throughout(batch):
    loss, gradients = loss_and_gradients(bert().bfloat16(), batch)
    assert loss.isfinite()
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}


def test_compiles_without_a_graph_break(batch):
    model = bert()
    eager_loss, eager = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    out = compiled(batch)
    (out.mlm_loss_sum + out.nsp_loss_sum).backward()
    assert relative_error(out.mlm_loss_sum + out.nsp_loss_sum, eager_loss) < 1e-6
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, eager[name]) < 1e-5, name


def test_other_counts_do_not_compile_anew(batch):
    """The counts of a batch differ at every step and must not cause a recompilation."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(bert(), fullgraph=True, backend=counter)
    for change in range(3):
        compiled(dataclasses.replace(batch, num_tokens=80 - change, num_masked=20 - change, num_pairs=4 - change))
    assert counter.frame_count == 1


def run(backend, model, dtype=torch.float32, seed=0):
    """`loss_and_gradients` of a small batch: the interpreter needs milliseconds a program."""
    batch = with_slack(pack_padded(**padded_examples(MICRO, (9, 1, 14), seed)), tokens=4, segments=1, masked=2)
    torch.manual_seed(3)
    with use_backend(backend):
        return loss_and_gradients(model.to(dtype), batch.to(DEVICE))


def test_the_kernels_agree_with_the_reference():
    model, found = bert(), []
    for seed in range(3):
        loss, gradients = run("triton", model, seed=seed)
        _, reference = run("reference", model, seed=seed)
        oracle_loss, oracle = run("reference", model, torch.float64, seed)
        assert relative_error(loss, oracle_loss) < 1e-6
        found.append((gradients, oracle, reference))
    for name in found[0][0]:
        gradient, oracle, reference = (torch.stack([batch[i][name] for batch in found]) for i in range(3))
        assert_as_good_as_torch(gradient, oracle, reference, name)


def test_the_kernels_drop_by_the_seed():
    """The same seed gives the same bits, backward included, and another seed another loss."""
    model = bert(DROPOUT)
    loss, gradients = run("triton", model)
    again_loss, again = run("triton", model)
    assert torch.equal(loss, again_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name
    whole_loss, _ = run("triton", model.eval())
    assert not torch.equal(loss, whole_loss)


@pytest.mark.parametrize("training", [True, False])
def test_every_operator_drops_with_its_probability_and_its_own_seed(batch, monkeypatch, training):
    calls = []

    def attention(qkv, cu_seqlens, max_seqlen, *, dropout_p, seed):
        calls.append((dropout_p, seed))
        return qkv[:, 0]

    def add_norm(x, residual, weight, bias, *, linear_bias, eps, p, seed):
        calls.append((p, seed))
        return residual

    monkeypatch.setattr("fusebert.model.encoder.attention_varlen", attention)
    monkeypatch.setattr("fusebert.model.encoder.dropout_add_layernorm", add_norm)
    config = dataclasses.replace(MICRO, attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.2)
    with use_backend("triton"):
        bert(config).train(training).encode(batch)
    probabilities, seeds = zip(*calls, strict=True)
    assert probabilities == ((0.1, 0.2, 0.2) if training else (0.0, 0.0, 0.0)) * MICRO.num_hidden_layers
    if training:
        assert torch.cat(seeds).unique().numel() == len(seeds)
        assert {(seed.dtype, seed.device.type) for seed in seeds} == {(torch.int64, DEVICE)}
    else:
        assert set(seeds) == {None}


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_step_does_not_synchronise_with_the_device(batch):
    model = bert(DROPOUT)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss_and_gradients(model, batch)  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_gradients(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_z_loss_is_added_in_training_alone(batch):
    model = bert().train()
    plain = model(batch).mlm_loss_sum
    hidden = model.encode(batch)[batch.masked_positions[batch.masked_labels != -100]]
    lse = model.predict_tokens(hidden).logsumexp(-1)
    model.z_loss = 0.5
    torch.testing.assert_close(model(batch).mlm_loss_sum, plain + 0.5 * (lse * lse).sum(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(model.eval()(batch).mlm_loss_sum, plain, rtol=1e-5, atol=0.0)


def test_the_encoder_stands_alone(batch):
    encoder = BertEncoder(MICRO).to(DEVICE)
    hidden = encoder(batch.input_ids, batch.token_type_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
    assert hidden.shape == (batch.input_ids.shape[0], MICRO.hidden_size)
