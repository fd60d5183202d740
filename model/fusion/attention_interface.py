"""Registers ``attn_implementation="fusebert"`` with Transformers.

Transformers has one registry for mask functions and one for attention functions. A name that is missing from the first
gets no mask, so padding would be attended to without a warning: both are registered. `masks` describes the masks.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.attn import attention, attention_varlen_separate, torch_path
from ...kernels.backend import choose_backend, in_autocast_dtype
from ...kernels.checks import MAX_HEAD_DIM
from .masks import additive_mask, build_mask, expanded_mask, padding_form

NAME = "fusebert"
# Arguments of some models that neither the kernels nor SDPA compute: ignoring one would change the result.
UNSUPPORTED = ("head_mask", "softcap", "s_aux")


@functools.cache
def warn_once(message: str) -> None:
    """Warn once a process: the attention of every layer and step repeats the message."""
    warnings.warn(message, UserWarning, stacklevel=3)


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():  # a warning would break the graph
        warn_once(message)


def register_attention() -> str:
    """Register ``attn_implementation="fusebert"`` with Transformers. Calling it again changes nothing.

    After this, ``AutoModel.from_pretrained(..., attn_implementation="fusebert")`` and
    ``model.set_attn_implementation("fusebert")`` run `fusebert.kernels.attention` in every encoder that uses
    Transformers' attention interface, with padding masks, bidirectional sliding windows and dropout. A query with no
    real key gets zeros. Causal masks and 4-D masks given by the caller run on SDPA, and ``output_attentions=True`` runs
    the model's eager attention, both with a warning. BERT and related models of Transformers 4 do not use the
    interface: they raise Transformers' error for this name; use `fuse` instead.

    Returns:
        ``"fusebert"``.

    Raises:
        ImportError: transformers is not installed or older than 4.56.
    """
    try:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import AttentionInterface
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers 4.56 or newer: pip install 'transformers>=4.56'"
        ) from error
    AttentionMaskInterface.register(NAME, build_mask)
    AttentionInterface.register(NAME, attention_forward)
    return NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of one layer. Called by Transformers.

    Args:
        query: [B, H, N_q, D]. key, value: [B, H_k, N_k, D].
        attention_mask: a form of `masks`.
        dropout: probability, 0 in eval.
        scaling: factor of the scores; None: 1/√D.
        is_causal: used only without a mask, as in SDPA; None: the module's attribute.
        kwargs: uses ``output_attentions``, ``position_bias`` and the segments of a packed batch (``cu_seq_lens_q``,
            ``max_length_q``, and ``…_k``). ``sliding_window`` is used for a packed batch only: otherwise the mask
            contains the window.

    Returns:
        (out [B, N_q, H, D], weights [B, H, N_q, N_k] with ``output_attentions=True``, else None).

    Raises:
        ValueError: a mask of no known form, or an argument that is not supported (``softcap``, ``head_mask``, …).
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} does not support {name}, which {type(module).__name__} passes: "
                "use 'eager' or another implementation that does"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if kwargs.get("cu_seq_lens_q") is not None:
        return _packed(query, key, value, attention_mask, dropout, scaling, causal, **kwargs), None
    padding = padding_form(attention_mask, query.shape[2], key.shape[0], key.shape[2])
    if kwargs.pop("output_attentions", False):
        _warn(f"output_attentions=True: {NAME} does not form the attention weights; the model's eager attention runs")
        mask = additive_mask(expanded_mask(attention_mask, query.shape[2]), query.dtype)
        return _eager(module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    reason = _why_sdpa(module, query, value, attention_mask, causal, kwargs.get("position_bias"))
    if padding is None or reason is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        reason = reason or "the attention mask has 4 dimensions (causal, packed, or given by the caller)"
        _warn(f"{reason}: Transformers' SDPA attention runs instead of {NAME}'s")
        mask = expanded_mask(attention_mask, query.shape[2])
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    real, window = padding  # [B, N_k]
    if real is None and window is None and choose_backend(query) == "reference":
        # On a CPU the argument checks of `attention` would take as long as SDPA for a short sequence.
        q, k, v = in_autocast_dtype(query, key, value)
        return torch_path.attend(q, k, v, None, dropout, scaling).transpose(1, 2), None
    out = attention(query, key, value, key_padding_mask=real, scale=scaling, dropout_p=dropout, window=window)
    return out.transpose(1, 2), None


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    cu_seq_lens_k: Tensor | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor:
    """[1, T, H, D] from query [1, H, T, D], …: one row of segments, the packed batch of Transformers.

    As in Transformers' flash attention, query i attends to key j where |i − j| < ``sliding_window``.
    """
    if mask is not None and mask.numel() == 0:
        mask = None  # see masks.no_mask
    if query.shape[0] != 1 or causal or mask is not None or output_attentions or position_bias is not None:
        raise ValueError(
            "cu_seq_lens_q needs a packed batch of one row with bidirectional attention, without attention_mask, "
            f"output_attentions and position_bias; got {query.shape[0]} rows, is_causal={causal}, attention_mask "
            f"{None if mask is None else list(mask.shape)}, output_attentions={output_attentions}, position_bias "
            f"{None if position_bias is None else list(position_bias.shape)}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    lengths = (cu_seq_lens_q, max_length_q, cu_seq_lens_k, max_length_k)
    window = None if sliding_window is None else sliding_window - 1
    return attention_varlen_separate(q, k, v, *lengths, scale=scaling, dropout_p=dropout, window=window)[None]


def _why_sdpa(
    module: nn.Module, query: Tensor, value: Tensor, mask: Tensor | None, causal: bool, position_bias: Tensor | None
) -> str | None:
    """The reason why SDPA must run, or None."""
    if mask is None and causal and query.shape[2] > 1:
        return f"{type(module).__name__} is causal"
    if position_bias is not None:
        return f"{type(module).__name__} adds a position bias to the scores"
    if query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] != query.shape[-1]:
        return (
            f"the kernels need one head size of at most {MAX_HEAD_DIM}, and these are {query.shape[-1]} (queries) and "
            f"{value.shape[-1]} (values)"
        )
    return None


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """``eager_attention_forward`` of the file that defines the module's class."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"output_attentions=True needs the attention weights, which {NAME} does not form, and {type(module).__name__} "
        "has no eager attention: load the model with attn_implementation='eager'"
    )
