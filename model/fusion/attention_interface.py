"""Transformers' own door: ``attn_implementation="fusebert"``, once `register_attention` has been called.

Transformers asks two registries about an attention name: how to build the mask, and how to attend. A name missing from
the first gets no mask at all, and padding is then attended to without a word; so both are registered, and the mask a
call gets is the whole truth about who attends to whom. Between the two functions it travels as

    None                      no padding
    bool [B, N_k]             True where a key is real
    bool [B, w + 1, N_k]      the same, and query i attends to key j only where |i − j| ≤ w: the axis is expanded,
                              without memory, and its size tells the window, whatever the model's own convention
    [B, 1 or H, N_q, N_k]     anything else (causal, packed, made by the caller): Transformers' SDPA attention computes
                              it, and a warning says so once

A mask given by the caller is never read to see whether it hides anything: that would wait for the device at every step
and break a compiled graph.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.attn.api import MAX_HEAD_DIM, attention, attention_varlen_separate

NAME = "fusebert"
# What some models pass and neither we nor SDPA compute: to ignore one would change the result.
UNSUPPORTED = ("head_mask", "softcap", "s_aux")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():  # a warning would break the graph
        _warn_once(message)


def register_attention() -> str:
    """Make ``attn_implementation="fusebert"`` known to Transformers; calling it again changes nothing.

    Then ``AutoModel.from_pretrained(..., attn_implementation="fusebert")``, or ``set_attn_implementation("fusebert")``
    on a model, runs `fusebert.kernels.attention` in every encoder that goes through Transformers' attention interface,
    with padding masks, bidirectional sliding windows and dropout. A query whose keys are all padding gets zeros.
    Causal masks and 4-D masks made by the caller run on SDPA, with a warning; ``output_attentions=True`` runs the
    model's eager attention, with a warning. In Transformers 4 BERT and its like have no attention interface: loading
    one by this name is Transformers' error, and `fuse` is the way.

    Returns:
        ``"fusebert"``.

    Raises:
        ImportError: transformers is not installed, or too old to have both registries.
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


def build_mask(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What Transformers calls to build the mask of one forward pass; forms in the module docstring.

    Args:
        mask_function: who may attend to whom, padding apart. ``bidirectional_mask_function``, or the symmetric window.
        attention_mask: the caller's, bool [B, N_k], or None.
        local_size: w, for a window.
        kwargs: what else the request holds; handed on where the mask is left to Transformers.

    Raises:
        ValueError: ``attention_mask`` has neither two nor four dimensions.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape [B, N], or [B, 1, N_q, N_k]; got {tuple(attention_mask.shape)}"
        )
    # Only requests for a bidirectional mask carry this word, true where nothing else was laid over or asked for.
    plain = kwargs.get("allow_is_bidirectional_skip") is True and not use_vmap and kv_offset == 0
    plain = plain and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    if plain and (local_size is not None or mask_function is bidirectional_mask_function):
        if attention_mask is None and local_size is None:
            return None
        if attention_mask is None:
            real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        else:
            real = attention_mask.to(device=device, dtype=torch.bool).expand(batch_size, kv_length)
        return real if local_size is None else real[:, None].expand(-1, local_size + 1, -1)
    # None would say "no padding" here, where SDPA takes it for "causal".
    kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    if device is not None:
        kwargs["device"] = device
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


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
    """What Transformers calls to attend.

    Args:
        query: [B, H, N_q, D]. key, value: [B, H_k, N_k, D].
        attention_mask: a form of the module docstring.
        dropout: 0 in eval.
        scaling: 1/√D when None.
        is_causal: counts only without a mask, as in SDPA's; the module's attribute when None.
        kwargs: ``output_attentions``, ``position_bias`` and the segments of a packed batch (``cu_seq_lens_q``,
            ``max_length_q``, and ``…_k``) are heeded; a ``sliding_window`` too, where the batch is packed: else it is
            in the mask already.

    Returns:
        (out [B, N_q, H, D], the weights [B, H, N_q, N_k] for ``output_attentions=True``, else None).

    Raises:
        ValueError: a mask of no known form, or an argument nobody here computes (``softcap``, ``head_mask``, …).
    """
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation={NAME!r} does not compute {name}, which {type(module).__name__} passes: "
                "use 'eager' or another implementation that does"
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if kwargs.get("cu_seq_lens_q") is not None:
        return _packed(query, key, value, attention_mask, dropout, scaling, causal, **kwargs), None
    _check_mask(attention_mask, query.shape[2], key.shape[0], key.shape[2])
    if kwargs.pop("output_attentions", False):
        _warn(f"output_attentions=True: {NAME} never forms the attention weights, so the model's eager attention runs")
        mask = additive_mask(_four_dimensional(attention_mask, query.shape[2]), query.dtype)
        return _eager(module)(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    reason = _why_sdpa(module, query, key, value, attention_mask, causal, kwargs.get("position_bias"))
    if reason is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        _warn(f"{reason}: Transformers' SDPA attention runs in place of {NAME}'s")
        mask = _four_dimensional(attention_mask, query.shape[2])
        return sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    window, real = None, attention_mask
    if real is not None and real.dim() == 3:
        window, real = real.shape[1] - 1, real[:, 0]
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
    """[1, T, H, D] from query [1, H, T, D], …: a batch of one row that holds segments, as Transformers packs them.

    ``sliding_window`` counts as in Transformers' flash attention: query i attends to key j where |i − j| < it.
    """
    if query.shape[0] != 1 or causal or mask is not None or output_attentions or position_bias is not None:
        raise ValueError(
            "cu_seq_lens_q describes a packed batch of one row, bidirectional, without attention_mask, a window, "
            f"output_attentions or position bias; got {query.shape[0]} rows, is_causal={causal}, attention_mask "
            f"{None if mask is None else list(mask.shape)}, output_attentions={output_attentions}"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D)
    lengths = (cu_seq_lens_q, max_length_q, cu_seq_lens_k, max_length_k)
    window = None if sliding_window is None else sliding_window - 1
    return attention_varlen_separate(q, k, v, *lengths, scale=scaling, dropout_p=dropout, window=window)[None]


def _check_mask(mask: Tensor | None, n_q: int, batch: int, n_k: int) -> None:
    if mask is None or mask.dim() == 4:
        return
    if mask.dim() not in (2, 3) or mask.dtype != torch.bool or (mask.shape[0], mask.shape[-1]) != (batch, n_k):
        raise ValueError(
            f"attention_mask must be bool [B, N_k] = {[batch, n_k]}, True where a key is real, or have 4 dimensions; "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask.dim() == 3 and n_q != n_k:
        raise ValueError(f"a sliding window needs as many queries as keys; got {n_q} and {n_k}")


def _why_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    position_bias: Tensor | None,
) -> str | None:
    if mask is not None and mask.dim() == 4:
        return "the attention mask has 4 dimensions (causal, packed, or made by the caller)"
    if mask is None and causal and query.shape[2] > 1:
        return f"{type(module).__name__} is causal"
    if position_bias is not None:
        return f"{type(module).__name__} adds a position bias to the scores"
    if query.shape[-1] > MAX_HEAD_DIM or value.shape[-1] != query.shape[-1]:
        return f"heads of {query.shape[-1]} (values of {value.shape[-1]}) are not what the kernels take"
    return None


def _four_dimensional(mask: Tensor | None, n_q: int) -> Tensor | None:
    """bool [B, 1, N_q or 1, N_k] from our forms; a 4-D mask as it is."""
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() == 2:
        return mask[:, None, None, :].expand(-1, -1, n_q, -1)
    i = torch.arange(n_q, device=mask.device)
    near = (i[:, None] - i).abs() < mask.shape[1]
    return mask[:, None, :1] & near


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What eager attention adds to the scores, from a mask that is True where a query attends."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _eager(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """``eager_attention_forward`` of the file that defines the module's class, where Transformers keeps it."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ValueError(
        f"output_attentions=True needs the attention weights, which {NAME} never forms, and {type(module).__name__} "
        "has no eager attention to run instead: load the model with attn_implementation='eager'"
    )
