"""`embed_layernorm`: BERT's three embeddings, LayerNorm and dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import KERNEL_DTYPES, choose_backend
from ..checks import (
    ID_DTYPES,
    check_cu_seqlens,
    check_dtype,
    check_eps,
    check_probability,
    check_same_device,
    check_same_dtype,
    check_same_shape,
    check_seed,
    check_tensor,
    check_vector,
    values_are_readable,
)
from ..dropout import dropout_mask, resolve_seed
from ..row_norm import MAX_HIDDEN_SIZE
from .op import EmbedLayerNorm, forward_op

ID_NAMES = ("input_ids", "token_type_ids", "position_ids")
TABLE_NAMES = ("word_weight", "token_type_weight", "position_weight")


def _positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """[T], cu_seqlens' dtype: each token's distance from the start of its segment. Does not synchronise."""
    tokens = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return tokens - cu_seqlens[torch.bucketize(tokens, cu_seqlens, right=True) - 1]


def _check_tables(tables: tuple[Tensor, Tensor, Tensor], input_ids: Tensor) -> None:
    word_weight = tables[0]
    for name, table in zip(TABLE_NAMES, tables, strict=True):
        check_tensor(name, table)
        if table.dim() != 2 or table.shape[0] == 0 or table.shape[1] != word_weight.shape[1]:
            width = "H" if word_weight.dim() != 2 else word_weight.shape[1]
            raise ValueError(f"{name} must have shape [rows, {width}], rows at least 1; got {tuple(table.shape)}")
        check_dtype(name, table)
        check_same_dtype(name, table, "word_weight", word_weight)
        check_same_device(name, table, "input_ids", input_ids)
    if sum(table.shape[0] for table in tables) >= 2**31:
        raise ValueError("word_weight, token_type_weight and position_weight together must have less than 2³¹ rows")


def _check_ids(ids: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor, Tensor]) -> None:
    for name, rows, table_name, table in zip(ID_NAMES, ids, TABLE_NAMES, tables, strict=True):
        check_dtype(name, rows, ID_DTYPES)
        check_same_shape(name, rows, "input_ids", ids[0])
        check_same_device(name, rows, "input_ids", ids[0])
        if not values_are_readable(rows) or rows.numel() == 0:
            continue  # the kernels give NaN for an id out of range
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= table.shape[0]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} must be in 0 … {table.shape[0] - 1}, the rows of {table_name}; got {wrong}")


def _run_reference(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    p: float,
    seed: int | Tensor | None,
    padding_idx: int | None,
    out_dtype: torch.dtype,
) -> Tensor:
    mask, shape, device = None, (*ids[0].shape, tables[0].shape[1]), ids[0].device
    if p > 0.0 and seed is not None:
        mask = dropout_mask(p, resolve_seed(seed, device), ids[0].numel(), shape[-1], device).view(shape)
    return reference.embed_layernorm(
        *ids, *tables, norm_weight, norm_bias,
        eps=eps, p=p, padding_idx=padding_idx, out_dtype=out_dtype, dropout_mask=mask,
    )  # fmt: skip


def embed_layernorm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor | None,
    word_weight: Tensor,
    token_type_weight: Tensor,
    position_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    eps: float,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Dropout(layernorm(word_weight[input_ids] + token_type_weight[token_type_ids] + position_weight[position_ids])).

    BERT's embeddings (Devlin et al. 2018, figure 2). Statistics are float32. The call does not synchronise with the
    device and every shape is constant, so a CUDA graph can capture forward and backward. A second derivative of the
    Triton path raises RuntimeError.

    Args:
        input_ids, token_type_ids, position_ids: int64 or int32 [..], of one shape. An id outside its table raises
            ValueError on the CPU. On a GPU, where reading the ids would stall the stream, its row of the result becomes
            NaN (0 where dropped), and so do the gradients that depend on it.
        word_weight, token_type_weight, position_weight: [V, H], [token types, H], [positions, H] of one dtype,
            bfloat16, float16 or float32. float64, H > 16384 and CPU tensors run the reference. Gradients are dense.
        norm_weight, norm_bias: [H] of the tables' dtype or float32, or None for 1 and 0.
        eps: added to the variance; BERT uses 1e-12.
        p: probability that an element of the result is dropped. The others are scaled by 1 / (1 − p).
        seed: selects the mask, as in `dropout_add_layernorm`, with the tokens in order as rows.
        padding_idx: this row of word_weight gets no gradient, as in ``nn.Embedding``.
        out_dtype: dtype of the result; the tables' when None. With float32 tables bfloat16 gives what autocast would.
        cu_seqlens: int32 or int64 [S + 1], with position_ids None and ids [T]. Positions count from 0 in each segment
            cu_seqlens[s] … cu_seqlens[s + 1] − 1, and after the last segment. They are computed by four small launches
            outside the kernel, because the backward needs them too.

    Returns:
        [.., H] of out_dtype, contiguous.

    Raises:
        ValueError: a shape or a device does not fit, eps is negative, p is outside [0, 1), padding_idx is outside the
            table, or both or neither of position_ids and cu_seqlens are given. On the CPU also: an id is out of range,
            or cu_seqlens decreases.
        TypeError: a dtype is not allowed, or seed has another type.
    """
    tables = (word_weight, token_type_weight, position_weight)
    check_dtype("input_ids", input_ids, ID_DTYPES)
    _check_tables(tables, input_ids)
    if (position_ids is None) == (cu_seqlens is None):
        given = "neither" if position_ids is None else "both"
        raise ValueError(f"position_ids and cu_seqlens: give one of them, the other None; got {given}")
    if position_ids is None:
        assert cu_seqlens is not None
        if input_ids.dim() != 1:
            raise ValueError(
                f"with cu_seqlens, input_ids must be packed, [T]; got {tuple(input_ids.shape)}: pass position_ids"
            )
        check_cu_seqlens("cu_seqlens", cu_seqlens, input_ids.shape[0], "input_ids", input_ids, ID_DTYPES)
        position_ids = _positions(cu_seqlens, input_ids.shape[0])
    ids = (input_ids, token_type_ids, position_ids)
    _check_ids(ids, tables)
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_vector(name, vector, word_weight.shape[1], "word_weight's columns", "word_weight", word_weight)
    check_eps(eps)
    check_probability("p", p)
    check_seed(seed, input_ids.device)
    if padding_idx is not None and not 0 <= padding_idx < word_weight.shape[0]:
        raise ValueError(f"padding_idx must be in 0 … {word_weight.shape[0] - 1}, or None; got {padding_idx}")
    out_dtype = word_weight.dtype if out_dtype is None else out_dtype
    if out_dtype not in (*KERNEL_DTYPES, word_weight.dtype):
        raise TypeError(f"out_dtype must be bfloat16, float16, float32 or the tables' dtype; got {out_dtype}")

    if choose_backend(word_weight) == "reference" or word_weight.shape[1] > MAX_HIDDEN_SIZE:
        return _run_reference(ids, tables, norm_weight, norm_bias, eps, p, seed, padding_idx, out_dtype)
    seed = resolve_seed(seed, input_ids.device) if p > 0.0 else None
    parameters = (*tables, norm_weight, norm_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in parameters):
        y: Tensor = EmbedLayerNorm.apply(p, eps, padding_idx, out_dtype, *parameters, *ids, seed)
        return y
    y, _, _ = forward_op(*ids, *parameters, seed, p, eps, out_dtype, False)
    return y
