"""BERT's input in the benchmark: Dropout(LayerNorm(word + token type + position)) and its three tables' gradients.

The tables are float32, the result has the case's dtype: what a training step under autocast asks for. Ids follow Zipf's
law, 15 % · 80 % of them [MASK]: a backward that adds up rows by id feels how often the frequent ones come. Least work
over T tokens of H elements, e = 4 bytes in a table, o in the result, V rows in all tables:

    pass        FLOPs   bytes
    forward     0       T ((e + o) H + 24)            (a row of each token's word and its three int64 ids read, the
                                                      result written; the small tables stay in the cache)
    backward    0       T ((e + o) H + 24) + V H e    (the same read, the result's gradient in its place; the tables'
                                                      gradients written, rows that do not occur too)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import dropout_mask, embed_layernorm, reference
from ..measure.case import COMPILE_IS_SLOW, OURS, Case, Contestant, Cost, Missing, Run, Tensors, leaf
from ..measure.shapes import Key, Operator, Shape

EPS, PADDING_IDX, MASK_ID, FIRST_ORDINARY = 1e-12, 0, 3, 4
POSITIONS, TYPES, SEQLEN = 512, 2, 128
IDS = ("input_ids", "token_type_ids", "position_ids")
DIFFERENTIATED = ("word", "token_type", "position", "weight", "bias")


def _inputs(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weights = 1.0 / (torch.arange(vocab - FIRST_ORDINARY, device=device) + 2.7)
    words = FIRST_ORDINARY + torch.multinomial(weights, tokens, replacement=True, generator=generator)
    masked = torch.rand(tokens, generator=generator, device=device) < 0.15 * 0.8
    positions = torch.arange(tokens, device=device) % SEQLEN
    return {
        "input_ids": words.masked_fill(masked, MASK_ID),
        "token_type_ids": (positions >= SEQLEN // 2).long(),
        "position_ids": positions,
        "word": 0.02 * draw(vocab, hidden_size),
        "token_type": 0.02 * draw(TYPES, hidden_size),
        "position": 0.02 * draw(POSITIONS, hidden_size),
        "weight": 1 + 0.1 * draw(hidden_size),
        "bias": 0.1 * draw(hidden_size),
        "dout": draw(tokens, hidden_size).to(dtype),
        "seed": torch.tensor([seed], dtype=torch.int64, device=device),
    }


def _named(out: Tensor, gradients: tuple[Tensor, ...]) -> Tensors:
    return {"out": out, **{f"d{name}": g for name, g in zip(DIFFERENTIATED, gradients, strict=True)}}


def _oracle(inputs: Tensors, dropout_p: float) -> Tensors:
    leaves = [leaf(inputs[name].double()) for name in DIFFERENTIATED]
    ids = [inputs[name] for name in IDS]
    mask = None
    if dropout_p:
        mask = dropout_mask(dropout_p, inputs["seed"], len(ids[0]), leaves[0].shape[1], device=ids[0].device)
    out = reference.embed_layernorm(*ids, *leaves, eps=EPS, p=dropout_p, padding_idx=PADDING_IDX, dropout_mask=mask)
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs["dout"].double()))


def _yardstick(dtype: torch.dtype, inputs: Tensors, dropout_p: float) -> Tensors:
    """PyTorch's operators; with dropout they would draw a mask of their own, so it is the reference with ours."""
    leaves = [leaf(inputs[name]) for name in DIFFERENTIATED]
    ids = [inputs[name] for name in IDS]
    mask = None
    if dropout_p:
        mask = dropout_mask(dropout_p, inputs["seed"], len(ids[0]), leaves[0].shape[1], device=ids[0].device)
    out = reference.embed_layernorm(
        *ids, *leaves, eps=EPS, p=dropout_p, padding_idx=PADDING_IDX, out_dtype=dtype, dropout_mask=mask
    )
    return _named(out.detach(), torch.autograd.grad(out, leaves, inputs["dout"]))


def _bind(call: Callable[..., Tensor], dtype: torch.dtype, inputs: Tensors, dropout_p: float) -> Run:
    leaves = tuple(leaf(inputs[name]) for name in DIFFERENTIATED)
    ids = [inputs[name] for name in IDS]
    return Run(lambda: call(*ids, *leaves, dtype, dropout_p, inputs.get("seed")), leaves, inputs["dout"], _named)


def _ours(*tensors_and_options: Any) -> Tensor:
    *tensors, dtype, p, seed = tensors_and_options
    return embed_layernorm(*tensors, eps=EPS, p=p, seed=seed, padding_idx=PADDING_IDX, out_dtype=dtype)


def _eager(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """As Transformers' BertEmbeddings under autocast; the cast is the first linear's."""
    x = F.embedding(input_ids, word, PADDING_IDX) + F.embedding(token_type_ids, token_type)
    x = x + F.embedding(position_ids, position)
    return F.dropout(F.layer_norm(x, x.shape[-1:], weight, bias, EPS), p).to(dtype)


def _case(
    value: int,
    tokens: int,
    hidden_size: int,
    vocab: int,
    p: float,
    dtype: torch.dtype,
    device: torch.device,
    quick: bool,
) -> Case:
    found = [
        Contestant("fusebert", functools.partial(_bind, _ours, dtype), role=OURS, replays_dropout=True),
        Contestant("torch eager", functools.partial(_bind, _eager, dtype)),
    ]
    missing = []
    if quick:
        missing.append(Missing("torch.compile", COMPILE_IS_SLOW))
    else:
        compiled = torch.compile(_eager, dynamic=False)
        found.append(Contestant("torch.compile", functools.partial(_bind, compiled, dtype)))
    each = tokens * ((4 + dtype.itemsize) * hidden_size + 24)
    tables = 4 * (vocab + POSITIONS + TYPES) * hidden_size
    return Case(
        op="embed_layernorm",
        name=f"T={tokens} H={hidden_size} V={vocab} dropout={p}",
        dtype=dtype,
        device=device,
        shape={"tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab},
        inputs=functools.partial(_inputs, tokens, hidden_size, vocab, dtype, device),
        oracle=_oracle,
        yardstick=functools.partial(_yardstick, dtype),
        passes={
            "forward": Cost(0, each),
            "backward": Cost(0, each + tables),
            "forward+backward": Cost(0, 2 * each + tables),
        },
        contestants=tuple(found),
        missing=tuple(missing),
        dropout_p=p,
        value=value,
    )


def _keys(device: torch.device) -> Mapping[str, Key]:
    """What a shape may say."""
    tokens, hidden_size, vocab = (65536, 768, 30522) if device.type == "cuda" else (1024, 128, 2048)
    return {
        "T": Key("tokens", tokens),
        "H": Key("elements of a row", hidden_size),
        "V": Key("words", vocab),
        "p": Key("dropout probability", 0.1),
    }


def _shaped(shape: Shape, device: torch.device, dtype: torch.dtype, *, quick: bool = False, value: int = 0) -> Case:
    """The case of a shape that says everything.

    Raises:
        ValueError: V leaves no room for ordinary words.
    """
    if int(shape["V"]) <= FIRST_ORDINARY:
        raise ValueError(f"V={shape['V']}: must be above {FIRST_ORDINARY}, the special tokens")
    tokens, hidden_size, vocab = (int(shape[name]) for name in ("T", "H", "V"))
    return _case(value, tokens, hidden_size, vocab, float(shape["p"]), dtype, device, quick)


_ON_A_GPU = ((2, "H=768"), (10, "H=1024; H=768,p=0; T=8192"))
_ON_A_CPU = ((2, "H=128"),)


def _built_in(device: torch.device) -> Sequence[tuple[int, str]]:
    """BERT-base's and BERT-large's input on a GPU; a small one on a CPU."""
    return _ON_A_GPU if device.type == "cuda" else _ON_A_CPU


OPERATOR = Operator(_keys, _built_in, _shaped)

__all__ = ["OPERATOR"]
