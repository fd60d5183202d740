"""Public calls: `masked_lm_loss`, the decoder's matrix product and its cross entropy, and `cross_entropy` of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import choose_backend, in_autocast_dtype
from ..checks import (
    check_dtype,
    check_label_values,
    check_labels,
    check_loss_options,
    check_number,
    check_same_device,
    check_same_dtype,
    check_tensor,
    check_vector,
    values_are_readable,
)
from .chunked import CHUNK_TILE, chunked_loss, most_rows
from .lean import lean_losses
from .softmax_rows import row_losses


def _check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}], V at least 1; got {tuple(weight.shape)}")
    check_same_dtype("weight", weight, "hidden", hidden)
    check_same_device("weight", weight, "hidden", hidden)
    check_vector("bias", bias, weight.shape[0], "one entry for each row of weight", "hidden", hidden)


def _compact(hidden: Tensor, labels: Tensor, ignore_index: int, max_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The labelled rows, in order, in max_labels slots. Shapes depend on no value, so the device is not synchronized.

    Returns:
        hidden [M, H], row 0 in spare slots; labels [M], ``ignore_index`` in spare slots; the slot of each labelled row,
        int64 [T]. If the rows do not fit, every label is outside any vocabulary, so that the loss is NaN.
    """
    labelled = labels != ignore_index
    slots = labelled.cumsum(0) - 1
    # Rows without a slot are written to one more slot at the end, which is cut off.
    target = torch.where(labelled, slots, max_labels).clamp(max=max_labels)
    rows = labels.new_zeros(max_labels + 1).scatter(0, target, torch.arange(labels.shape[0], device=labels.device))
    kept = labels.new_full((max_labels + 1,), ignore_index).scatter(0, target, labels)
    overflow = labelled.sum() > max_labels
    kept = torch.where(overflow, torch.iinfo(torch.int64).min, kept[:max_labels])
    return hidden.index_select(0, rows[:max_labels]), kept, slots.clamp(0, max_labels - 1)


def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    return_accuracy: bool = False,
    max_labels: int | None = None,
    lean: bool = False,
    skip_tolerance: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross entropy of the decoder's logits, hidden @ weightᵀ + bias, over the rows that have a label.

    Devlin et al. 2018, §3.1: L = −(1/M) Σ log p(token), in nats. The result is that of
    ``F.cross_entropy(F.linear(hidden, weight, bias), labels)`` plus ``z_loss`` · lse² per row, but the logits exist in
    hidden's dtype only and at most 2 GiB at a time, or not at all (``lean``).

    Args:
        hidden: [.., H], e.g. [T, H] or [B, N, H], bfloat16, float16 or float32; float64 runs the reference. Under
            autocast hidden and weight are converted to autocast's dtype, as a linear layer does.
        weight: [V, H], hidden's dtype, any V. In BERT it is tied to the word embeddings.
        bias: [V], hidden's dtype or float32, or None. float32 is rounded to hidden's dtype; its gradient is not.
        labels: int64 [..], the token of each row, or ``ignore_index``.
        reduction: "mean" over the labelled rows, "sum", or "none". Without a labelled row the loss and every gradient
            are 0.
        label_smoothing: ε in [0, 1]; the target is (1 − ε) · onehot + ε / V (Szegedy et al. 2016).
        z_loss: weight of lse², which keeps the softmax's denominator near 1 (Chowdhery et al. 2022; PaLM used 1e-4).
        return_accuracy: also return the number of labelled rows for which the label is the arg max of the logits as
            computed, in hidden's dtype (float32 with ``lean``). The first of equal logits counts, as in
            ``torch.argmax``.
        max_labels: an upper bound M on the number of labelled rows. If given, only those rows are multiplied with the
            vocabulary. They are gathered without synchronizing the device, and every shape is constant, so a CUDA graph
            can capture the call. None: all rows are used, which is right if the caller has gathered them.
        lean: use the least memory, a few bytes per row beside the gradients, instead of the least time: two thirds more
            matrix work. The result is the same to rounding. The reference computes 128 rows of logits at a time.
        skip_tolerance: with ``lean`` on a GPU, skip nearly zero tiles of the logits' gradient G in the backward's
            products. At most this much of each row's Σ|G| is skipped (Σ|G| ≤ 2 without z-loss). With u a row's upstream
            gradient, its dhidden is off by at most skip_tolerance · |u| · max ‖weight row‖, and dweight's rows by
            skip_tolerance · Σ |u| ‖hidden row‖ in total. ``torch.finfo(dtype).eps / 2`` is the rounding error of G
            itself. 0 skips nothing.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-dim, or for "none" the shape of labels, 0 where ignored.
        With ``return_accuracy`` (loss, correct), correct an int64 0-dim tensor.

    Triton runs for CUDA tensors. There, a label outside 0 … V − 1 makes its row's loss NaN, and more than
    ``max_labels`` labelled rows make every row's loss NaN: raising an error would stall the GPU at every step. The
    gradient is computed in the forward, unless ``lean``, grad mode is off or no input requires it. Under torch.compile
    the reference (CPU) neither skips unlabelled rows nor computes logits in chunks.

    Raises:
        ValueError: a shape, device, reduction, label_smoothing, z_loss, max_labels or skip_tolerance that is not
            allowed; on the CPU also a label out of range or more labelled rows than ``max_labels``.
        TypeError: a dtype that is not allowed.
        RuntimeError: in the Triton path's backward, under create_graph=True: the gradient has no gradient.
    """
    check_loss_options(reduction, label_smoothing, z_loss)
    check_dtype("hidden", hidden)
    check_labels(labels, "hidden", hidden)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    given = hidden.dtype
    hidden, weight = in_autocast_dtype(hidden, weight)
    if bias is not None and bias.dtype == given != torch.float32:
        bias = bias.to(hidden.dtype)
    _check_decoder(hidden, weight, bias)
    if max_labels is not None and (type(max_labels) not in (int, torch.SymInt) or max_labels < 1):
        raise ValueError(f"max_labels must be an int of at least 1, or None; got {max_labels!r}")
    check_number("skip_tolerance", skip_tolerance)
    if not 0.0 <= skip_tolerance < float("inf"):
        raise ValueError(f"skip_tolerance must be 0 or more; got {skip_tolerance}")
    if skip_tolerance and not lean:
        raise ValueError(f"skip_tolerance is for lean=True; got {skip_tolerance} with lean=False: pass lean=True, or 0")
    backend = choose_backend(hidden)
    shape, vocab_size = labels.shape, weight.shape[0]
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    if values_are_readable(labels) or (backend == "reference" and not torch.compiler.is_compiling()):
        check_label_values(labels, vocab_size, ignore_index, max_labels)
    per_row = reduction == "none"
    if backend == "reference":
        loss, correct = reference.masked_lm_loss(
            hidden,
            weight,
            None if bias is None else bias.to(hidden.dtype),
            labels,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            # Beside the logits: a float32 copy, the softmax and the gradients of both.
            chunk_rows=CHUNK_TILE if lean else most_rows(vocab_size, 4 * max(hidden.element_size(), 4)),
        )
    else:
        row_labels, slots = labels, None
        if max_labels is not None and max_labels < labels.shape[0]:
            hidden, row_labels, slots = _compact(hidden, labels, ignore_index, max_labels)
        options = (ignore_index, label_smoothing, z_loss)
        if lean:
            loss, correct = lean_losses(hidden, weight, bias, row_labels, *options, skip_tolerance)
            loss = loss if per_row else loss.sum()
        else:
            loss, correct = chunked_loss(hidden, weight, bias, row_labels, per_row, *options)
        if per_row and slots is not None:
            loss = torch.where(labels != ignore_index, loss.index_select(0, slots), 0.0)
        if reduction == "mean":
            loss = loss / (labels != ignore_index).sum().clamp(min=1)
    loss = loss.reshape(shape) if per_row else loss
    return (loss, correct) if return_accuracy else loss


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` over the last axis, plus z-loss, for a model that has its logits in memory.

    The forward reads the logits once. The backward reads them once and writes their gradient, in their dtype, to a new
    tensor. 8 bytes per row are saved beside the logits.

    Args:
        logits: [.., V], bfloat16, float16 or float32; float64 runs the reference. Rows that start at multiples of
            16 bytes are read faster.
        labels: int64 [..], or ``ignore_index``.
        reduction, label_smoothing, z_loss: as in `masked_lm_loss`.

    Returns:
        The loss, float32 (float64 for float64 logits): 0-dim, or for "none" the shape of labels, 0 where ignored.
        On a GPU a label out of range makes its row's loss NaN.

    Raises:
        ValueError: a shape, device, reduction, label_smoothing or z_loss that is not allowed; on the CPU also a label
            out of range.
        TypeError: a dtype that is not allowed.
        RuntimeError: in the Triton path's backward, under create_graph=True.
    """
    check_loss_options(reduction, label_smoothing, z_loss)
    check_dtype("logits", logits)
    check_labels(labels, "logits", logits)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column; got {tuple(logits.shape)}")
    backend = choose_backend(logits)
    rows, row_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).contiguous()
    if values_are_readable(row_labels) or (backend == "reference" and not torch.compiler.is_compiling()):
        check_label_values(row_labels, logits.shape[-1], ignore_index, None)
    if backend == "reference":
        losses = reference.cross_entropy_rows(
            rows, row_labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
        )
    else:
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        losses = row_losses(rows, row_labels, ignore_index, label_smoothing, z_loss)
    if reduction == "none":
        return losses.reshape(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (row_labels != ignore_index).sum().clamp(min=1)
