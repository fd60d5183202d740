"""Checks of the operators' arguments: the same fault has the same wording in every operator.

A check raises TypeError for a dtype or a Python type and ValueError for a shape, a device or a value. The message names
the argument, what is allowed and what was given. Values of tensors are read where `values_are_readable` only.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)


def values_are_readable(x: Tensor) -> bool:
    """Whether reading x's values is free: a GPU's stream would stall, and traced and fake tensors have no values."""
    fake = torch.compiler.is_compiling() or isinstance(x, torch._subclasses.FakeTensor)
    return x.device.type == "cpu" and not fake


def check_tensor(name: str, x: Tensor) -> None:
    """x is a tensor with strides: no list or array, and not sparse."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got the layout {x.layout}: convert it with {name}.to_dense()")


def check_number(name: str, x: float) -> None:
    if not isinstance(x, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{name} must be a number; got {type(x).__name__}")


def check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
    check_tensor(name, x)
    if x.dtype not in allowed:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name} must be {', '.join(most) + ' or ' if most else ''}{last}; got {x.dtype}")


def check_same_dtype(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype != like.dtype:
        raise TypeError(f"{name} must have {like_name}'s dtype, {like.dtype}; got {x.dtype}: convert one of them")


def check_same_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(name, x)
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like_name}'s device, {like.device}; got {x.device}: move one of them")


def check_same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    check_tensor(name, x)
    if x.shape != like.shape:
        raise ValueError(f"{name} must have {like_name}'s shape, {tuple(like.shape)}; got {tuple(x.shape)}")


def check_has_columns(name: str, x: Tensor, symbol: str) -> None:
    """x has a last axis, called ``symbol`` in the message."""
    check_tensor(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name} must have at least one dimension, [.., {symbol}]; got a scalar")


def check_vector(name: str, vector: Tensor | None, size: int, meaning: str, like_name: str, like: Tensor) -> None:
    """A parameter is None, or [size] of like's dtype or float32, on like's device. meaning: what the size is."""
    if vector is None:
        return
    check_tensor(name, vector)
    if vector.dim() != 1 or vector.shape[0] != size:
        raise ValueError(f"{name} must have shape ({size},), {meaning}; got {tuple(vector.shape)}")
    if vector.dtype not in (like.dtype, torch.float32):
        raise TypeError(f"{name} must have {like_name}'s dtype, {like.dtype}, or float32; got {vector.dtype}")
    check_same_device(name, vector, like_name, like)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def check_probability(name: str, p: float) -> None:
    """p is the probability that an element is dropped."""
    check_number(name, p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name}, the dropout probability, must be in [0, 1); got {p}")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative; got {eps}")


def check_seed(seed: int | Tensor | None, device: torch.device) -> None:
    """A seed is None, an int of 64 bits, or an int64 tensor of one element on the device."""
    if seed is None:
        return
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor; got {seed.dtype}")
        if seed.numel() != 1 or seed.device != device:
            raise ValueError(f"seed must be one element on {device}; got shape {tuple(seed.shape)} on {seed.device}")
    elif not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, an int64 tensor or None; got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, signed; got {seed}")


def segment_lengths(cu_seqlens: Tensor) -> list[int]:
    """The rows of each segment of cu_seqlens [S + 1]. Exact for any int32."""
    return [end - start for start, end in itertools.pairwise(cu_seqlens.tolist())]


def check_cu_seqlens(
    name: str,
    cu_seqlens: Tensor,
    num_rows: int,
    like_name: str,
    like: Tensor,
    allowed: tuple[torch.dtype, ...] = (torch.int32,),
) -> None:
    """Segment s is rows cu_seqlens[s] … cu_seqlens[s + 1] − 1 of num_rows; rows after the last segment are allowed."""
    check_dtype(name, cu_seqlens, allowed)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(f"{name} must have shape [S + 1], S at least 1; got {tuple(cu_seqlens.shape)}")
    check_same_device(name, cu_seqlens, like_name, like)
    if not values_are_readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()  # in Python: a few tensor operations would take longer than a small batch's attention
    if ends[0] != 0 or ends[-1] > num_rows or ends != sorted(ends):
        raise ValueError(
            f"{name} must start at 0, never fall and end at most at {num_rows}, the number of rows; got "
            f"{ends if len(ends) <= 16 else cu_seqlens}"
        )


MAX_HEAD_DIM = 256  # of attention's kernels


def check_axes(name: str, x: Tensor, axes: str) -> None:
    """axes: what the message shows, "[B, H, N, D]" for four."""
    check_tensor(name, x)
    if x.dim() != axes.count(",") + 1:
        raise ValueError(f"{name} must have shape {axes}; got {tuple(x.shape)}")


def check_head_dim(name: str, x: Tensor) -> None:
    if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"the head size (last axis of {name}) must be 1 … {MAX_HEAD_DIM}; got {x.shape[-1]}")


def check_packed_qkv(qkv: Tensor) -> None:
    check_tensor("qkv", qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must have shape [T, 3, H, D]; got {tuple(qkv.shape)}")
    if qkv.shape[2] == 0:
        raise ValueError(f"qkv must have at least one head; got {tuple(qkv.shape)}")
    check_dtype("qkv", qkv)
    check_head_dim("qkv", qkv)


def check_separate_qkv(q: Tensor, k: Tensor, v: Tensor, axes: str) -> None:
    """q, k and v have the axes, one dtype and device, one head size, and k's heads divide q's. Axis 1 is the heads."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_axes(name, x, axes)
    check_dtype("q", q)
    for name, x in (("k", k), ("v", v)):
        check_same_dtype(name, x, "q", q)
        check_same_device(name, x, "q", q)
    check_head_dim("q", q)
    check_same_shape("v", v, "k", k)
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head size, {q.shape[-1]}; got {k.shape[-1]}")
    if 0 in (q.shape[1], k.shape[1]) or q.shape[1] % k.shape[1]:
        raise ValueError(f"q's heads must be a multiple of k's; got {q.shape[1]} and {k.shape[1]}")


def check_attention_options(
    scale: float | None, dropout_p: float, seed: int | Tensor | None, window: int | None, device: torch.device
) -> None:
    check_probability("dropout_p", dropout_p)
    check_seed(seed, device)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or not 0 <= window < 2**31):
        raise ValueError(f"window must be None or an int of at least 0, below 2^31; got {window!r}")
    if scale is not None:
        check_number("scale", scale)
    if scale is not None and not scale > 0.0:
        raise ValueError(f"scale must be positive, or None for 1/√D; got {scale!r}")


def check_key_padding_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """A mask is None or bool [B, N_k] on q's device; k is [B, H, N_k, D]."""
    if mask is None:
        return
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"key_padding_mask must be bool, True where a key is real; got {mask.dtype}")
    if mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_padding_mask must have shape {(k.shape[0], k.shape[2])}; got {tuple(mask.shape)}")
    check_same_device("key_padding_mask", mask, "q", q)


def check_max_seqlen(name: str, max_seqlen: int, cu_seqlens: Tensor) -> None:
    if not isinstance(max_seqlen, int | torch.SymInt) or isinstance(max_seqlen, bool) or not 1 <= max_seqlen < 2**31:
        raise ValueError(f"{name} must be an int of at least 1, below 2^31; got {max_seqlen!r}")
    if values_are_readable(cu_seqlens) and (longest := max(segment_lengths(cu_seqlens))) > max_seqlen:
        raise ValueError(f"{name} is {max_seqlen}, but the longest segment has {longest} rows: pass at least that")


def check_loss_options(reduction: str, label_smoothing: float, z_loss: float) -> None:
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_number("label_smoothing", label_smoothing)
    check_number("z_loss", z_loss)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be 0 or more, and finite; got {z_loss}")


def check_labels(labels: Tensor, like_name: str, like: Tensor) -> None:
    """labels is int64 with one entry for each row of like [.., n]."""
    check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}: convert them with labels.long()")
    if like.dim() < 2 or labels.shape != like.shape[:-1]:
        raise ValueError(
            f"labels must have one entry for each row of {like_name}; got labels {tuple(labels.shape)}, "
            f"{like_name} {tuple(like.shape)}"
        )
    check_same_device("labels", labels, like_name, like)


def check_label_values(labels: Tensor, vocab_size: int, ignore_index: int, max_labels: int | None) -> None:
    """Reads the values: for the reference, and where `values_are_readable`. Kernels make the loss NaN instead."""
    labelled = labels[labels != ignore_index]
    if labelled.numel() and not 0 <= int(labelled.min()) <= int(labelled.max()) < vocab_size:
        wrong = int(labelled.min()) if int(labelled.min()) < 0 else int(labelled.max())
        raise ValueError(f"labels must be in 0 … {vocab_size - 1} or ignore_index ({ignore_index}); got {wrong}")
    if max_labels is not None and labelled.numel() > max_labels:
        raise ValueError(
            f"labels has {labelled.numel()} labelled rows, more than max_labels = {max_labels}: raise max_labels"
        )
