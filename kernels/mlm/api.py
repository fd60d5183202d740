"""Masked-LM loss: the decoder's matrix product and its cross entropy in one operator, in bounded memory.

Only the M rows with a label count. With x = hWᵀ + b the logits of a row (V of them), y its label, ε the label
smoothing and ζ the weight of the z-loss (Chowdhery et al. 2022, PaLM, §5):

    forward     m = max_w x_w      l = Σ_w exp(x_w − m)      lse = m + log l      p_w = exp(x_w − m) / l
                loss = lse − (1 − ε) x_y − (ε / V) Σ_w x_w + ζ lse²
    backward    G_w = (1 + 2ζ lse) p_w − (1 − ε)[w = y] − ε / V            dloss / dx_w, at most 1 + 2ζ lse in size
                dH = G W      dW = Gᵀ H      db = Σ_rows G

Four designs, and beside the products' FLOPs the bytes they move that the products do not, at 2 bytes an element:

    (a) logits kept for the backward; made again there where they exceed the budget     6 (8) MHV FLOPs, 6 MV bytes
    (b) fused tiles, no logits: dH and dW each make their own                          10 MHV FLOPs, 20 bytes a row
        (one tile for both, as in cut cross-entropy: 8 MHV, by locks or atomics)            and share of the words
    (c) the forward makes the gradients, the backward scales them                       6 MHV FLOPs,
        by the loss's own gradient                                                          6 MV + 4 VH + 4 MH bytes
    where logits come in chunks, dW is summed over them in fp32, (a) and (c):           12 VH bytes a chunk, 6 VH once

    M = 9830 (15 % of 65k tokens), H = 768, in TFLOP and GB; times and effective rates, 8 MHV FLOPs over the time, are
    derived from one H200's measured ceilings (790 TFLOP/s, 4.3 TB/s), nothing else lost; none is measured:

                                 V = 30528                  V = 131072                 V = 262144
    the three products alone     1.38, 0:     1.75 ms       5.94, 0:     7.5 ms        11.9, 0:     15.0 ms
    (a)                          1.38, 1.8:   2.17 ms       7.92, 10.8: 12.5 ms        15.8, 23.9:  25.6 ms
    (b)                          2.30, 0:     2.92 ms       9.90, 0:    12.5 ms        19.8, 0:     25.1 ms
    (c)                          1.38, 1.9:   2.20 ms       5.94, 11.2: 10.1 ms        11.9, 24.8:  20.8 ms
    F.linear + F.cross_entropy   1.38, 4.2:   2.73 ms       5.94, 18.0: 11.7 ms        11.9, 36.1:  23.4 ms
    memory beside the gradients  (c) 0.6 GiB, (b) 3 MB      (c) 1.8 GiB, (b) 3 MB      (c) 2.8 GiB, (b) 3 MB
    effective, (c) and (b)       840 and 630 TFLOP/s        780 and 630                760 and 630

Chosen: (c) for time (``mlm_loss_chunked.py``) and (b) for memory (``mlm_loss_lean.py``, ``lean=True``). Per logit the
products cost 6H FLOPs, 5.8 ps at H = 768; the six bytes of (a) and (c) 1.4 ps; the 4H FLOPs that (b) does again 3.9 ps.
At BERT's width a logit is cheaper to move than to make; below H = 275 that turns round. (a) and (c) tie where one chunk
suffices; where it does not, only (c) stays at 6 MHV, and it gives the logits' memory back before the backward begins.
Its price: a forward whose gradient nobody wants belongs under ``torch.no_grad``. reduction="none" has one upstream
gradient a row, so there the chunked backward computes everything again (8 MHV).

How far that can go: six bytes a logit bound (c) to 1.24 × the products at H = 768 and 1.05 × at H = 4096: 840 and 990
effective TFLOP/s of the 1053 that 8 for 6 MHV at 790 makes. Liger publishes 666–698 for its CuTe kernels on an H100 at
H = 4096, V = 131072 (8 MHV, M = 8k–32k): the width costs a sixth of what is possible, the bytes, not the products. Two
of the six bytes would go if the first product's epilogue took the row statistics (1.16 × at H = 768), as the lean
forward does. That saves 0.47 ps a logit, and has to be paid from the first product's 1.95 ps: a Triton product and its
epilogue must together reach 76 % of cuBLAS's rate to come out even, and at 90 %, good for K = 768, the gain is 3 % of
the whole. Not built.

Any vocabulary size: in tiles of hidden · weightᵀ the contiguous axis is H, so the lean kernels load 16 bytes at a time
whatever V is; the chunked mode pads logits to whole 128 bytes (see there).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import choose_backend
from .chunked import CHUNK_TILE, linear_cross_entropy, most_rows
from .lean import lean_linear_cross_entropy
from .softmax_rows import check_labels, check_options, check_rows


def _check_decoder(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}], V at least 1; got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"hidden and weight must have one dtype; got hidden {hidden.dtype}, weight {weight.dtype}: "
            "cast the weight, weight.to(hidden.dtype)"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight must be on hidden's device, {hidden.device}; got {weight.device}")
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one entry for each row of weight; got {tuple(bias.shape)}")
    if bias.dtype not in (hidden.dtype, torch.float32):
        raise TypeError(f"bias must be {hidden.dtype}, as hidden is, or float32; got {bias.dtype}")
    if bias.device != hidden.device:
        raise ValueError(f"bias must be on hidden's device, {hidden.device}; got {bias.device}")


def _compact(hidden: Tensor, labels: Tensor, ignore_index: int, max_labels: int) -> tuple[Tensor, Tensor, Tensor]:
    """The labelled rows, in order, in max_labels slots: no size depends on a value, so nothing waits for the device.

    Returns (hidden [M, H], row 0 again in spare slots; labels [M], there ignore_index; int64 [T]: the slot of each
    labelled row).
    Where the rows do not fit, every label becomes one outside any vocabulary: the loss is NaN.
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

    Devlin et al. 2018, §3.1: L = −(1/M) Σ log p(token), in nats. As ``F.cross_entropy(F.linear(hidden, weight, bias),
    labels)``, plus ``z_loss`` · lse² a row, but the logits exist in hidden's dtype only, 2 GiB of them at most, or not
    at all (``lean``).

    Args:
        hidden: [.., H], e.g. [T, H] or [B, N, H], bfloat16, float16 or float32 (float64 runs the reference).
        weight: [V, H], hidden's dtype; any V. Tied to the word embeddings in BERT.
        bias: [V], hidden's dtype or float32, or None. float32 is rounded to hidden's dtype; its gradient is not.
        labels: int64 [..], the token of each row, or ``ignore_index``.
        reduction: "mean" over the labelled rows, "sum", or "none". Without a labelled row the loss is 0, and so is
            every gradient.
        label_smoothing: ε: the target is (1 − ε) · onehot + ε / V (Szegedy et al. 2016).
        z_loss: weight of lse², which keeps the softmax's denominator near 1 (0: none; PaLM used 1e-4).
        return_accuracy: also return how many labelled rows have their label as arg max of the logits as computed, in
            hidden's dtype (float32 with ``lean``); of equal logits the first counts, as in ``torch.argmax``.
        max_labels: an upper bound M on the labelled rows. Given, those rows alone meet the vocabulary, gathered without
            waiting for the device, every shape constant: a CUDA graph can hold the call. None: rows are used as they
            are, which is right when the caller has gathered them; an unlabelled row then costs its matrix products.
        lean: least memory instead of least time: beside the gradients a few bytes a row (``mlm_loss_lean.py``), for two
            thirds more matrix work. The same result to rounding. The reference has 128 rows of logits at a time.
        skip_tolerance: with ``lean`` on a GPU, leave out of the backward's products tiles of the logits' gradient G
            that are nearly zero: of each row's Σ|G| (at most 2 without z-loss) no more than this, so with u a row's
            upstream gradient, its dhidden is off by at most skip_tolerance · |u| · max ‖weight row‖, and dweight's rows
            by skip_tolerance · Σ |u| ‖hidden row‖ in all. ``torch.finfo(dtype).eps / 2`` is what rounding G may do
            anyway. 0: nothing is left out.

    Returns:
        The loss, float32 (float64 for float64): 0-dim, or the shape of labels, 0 where ignored, for "none".
        With ``return_accuracy`` (loss, correct), correct an int64 0-dim tensor.

    The gradient is computed in the forward, unless grad mode is off, nothing asks for it, or ``lean``; it has no
    gradient itself (create_graph=True is a RuntimeError). Triton runs for CUDA tensors. There a label outside
    0 … V − 1 makes its row's loss NaN, and more labelled rows than ``max_labels`` make every row's: reading the labels
    to raise an error would stall the GPU at every step. Under torch.compile the reference (CPU) does not skip
    unlabelled rows either, nor make its logits in chunks.

    Raises:
        ValueError: a shape, device, reduction, label_smoothing, z_loss, max_labels or skip_tolerance that does not fit;
            on the CPU, also a label out of range, or more labelled rows than ``max_labels``.
        TypeError: a dtype that does not fit.
    """
    check_options(reduction, label_smoothing, z_loss)
    check_rows("hidden", hidden, labels)
    _check_decoder(hidden, weight, bias)
    if max_labels is not None and max_labels < 1:
        raise ValueError(f"max_labels must be at least 1, or None; got {max_labels}")
    if not 0.0 <= skip_tolerance < float("inf"):
        raise ValueError(f"skip_tolerance must be 0 or more; got {skip_tolerance}")
    if skip_tolerance and not lean:
        raise ValueError(f"skip_tolerance is for lean=True; got {skip_tolerance} with lean=False: pass lean=True, or 0")
    backend = choose_backend(hidden)
    shape, vocab_size = labels.shape, weight.shape[0]
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).contiguous()
    if (backend == "reference" or not hidden.is_cuda) and not torch.compiler.is_compiling():
        check_labels(labels, vocab_size, ignore_index, max_labels)
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
            # A float32 copy, the softmax and both their gradients stand beside the logits.
            chunk_rows=CHUNK_TILE if lean else most_rows(vocab_size, 4 * max(hidden.element_size(), 4)),
        )
    else:
        row_labels, slots = labels, None
        if max_labels is not None and max_labels < labels.shape[0]:
            hidden, row_labels, slots = _compact(hidden, labels, ignore_index, max_labels)
        per_row = reduction == "none"
        options = (ignore_index, label_smoothing, z_loss)
        if lean:
            loss, correct, *_ = lean_linear_cross_entropy(hidden, weight, bias, row_labels, *options, skip_tolerance)
            loss = loss if per_row else loss.sum()
        else:
            wanted = [
                x is not None and torch.is_grad_enabled() and not per_row and x.requires_grad
                for x in (hidden, weight, bias)
            ]
            loss, correct, *_ = linear_cross_entropy(hidden, weight, bias, row_labels, None, *options, per_row, *wanted)
        if per_row and slots is not None:
            loss = torch.where(labels != ignore_index, loss.index_select(0, slots), 0.0)
        if reduction == "mean":
            loss = loss / (labels != ignore_index).sum().clamp(min=1)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, correct) if return_accuracy else loss


__all__ = ["masked_lm_loss"]
