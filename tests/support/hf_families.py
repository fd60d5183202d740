"""Tiny random Transformers models of the families that `fuse` supports, a batch for each, and the compared outputs."""

import torch
from oracle import DEVICE
from torch import nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": 61, "max_position_embeddings": 40}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
DISTIL = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "max_position_embeddings": 40}
MODERN = {
    "global_attn_every_n_layers": 2,
    "local_attention": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
VIT = {"image_size": 8, "patch_size": 2, "num_channels": 3}
NO_DROPOUT = dict.fromkeys(DROPOUTS, 0.0)
# class, configuration, the output that is compared, number of modules fused in two layers
FAMILIES = {
    "bert": ("BertModel", {**TEXT, **NO_DROPOUT}, "last_hidden_state", 1 + 4 + 1),
    "bert-mlm": ("BertForMaskedLM", {**TEXT, **NO_DROPOUT}, "logits", 1 + 4 + 2),
    "bert-pretraining": ("BertForPreTraining", {**TEXT, **NO_DROPOUT}, "prediction_logits", 1 + 4 + 2),
    "bert-classification": ("BertForSequenceClassification", {**TEXT, **NO_DROPOUT}, "logits", 1 + 4 + 1),
    "roberta": ("RobertaForMaskedLM", {**TEXT, **NO_DROPOUT, "pad_token_id": 0}, "logits", 1 + 4 + 2),
    "electra": ("ElectraModel", {**TEXT, **NO_DROPOUT, "embedding_size": 16}, "last_hidden_state", 1 + 4 + 1),
    "distilbert": ("DistilBertForMaskedLM", {**DISTIL, "dropout": 0.0, "attention_dropout": 0.0}, "logits", 1 + 4 + 2),
    "modernbert": ("ModernBertForMaskedLM", {**TEXT, **MODERN}, "logits", 1 + 3 + 3),
    "vit": ("ViTModel", {**SIZES, **VIT, **NO_DROPOUT}, "last_hidden_state", 1 + 4 + 1),
}


def build(family: str, seed: int = 0, **settings) -> nn.Module:
    """A random model without special values: biases are not 0, norms are not 1 and 0."""
    import transformers

    name, fields, _, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**{**fields, **settings}))
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(DEVICE)


def batch(family: str, lengths: tuple[int, ...] = (17, 3, 11), seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        inputs = {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    else:
        shape = (len(lengths), max(lengths))
        mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
        ids = torch.randint(3, 61, shape, generator=generator)
        inputs = {"input_ids": ids * mask, "attention_mask": mask.long()}
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def output_of(family: str, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The family's output without padding: [rows, features]."""
    dtype = next(model.parameters()).dtype
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    out = model(**inputs)[FAMILIES[family][2]]
    if out.dim() == 3 and "attention_mask" in inputs:
        out = out[inputs["attention_mask"].bool()]
    return out


def output_and_gradients(family, model, inputs):
    """(output, {parameter: gradient}) of a random linear functional of the output."""
    out = output_of(family, model, inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad()
    (out * weights.to(out)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class LinearInputs(torch.overrides.TorchFunctionMode):
    """Records the leading sizes of every linear layer's input, without a hook that `fuse` would notice."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            self.sizes.append(tuple(args[0].shape[:-1]))
        return function(*args, **kwargs or {})


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])
