"""The attention masks of ``attn_implementation="fusebert"``.

Transformers builds a mask once a forward pass with `build_mask` and hands it to each layer's attention:

    None                        no padding
    bool [B, 1, 1, N_k]         True where a key is real
    bool [B, 1, 1, w + 1, N_k]  the same with a window: query i attends to key j only where |i − j| ≤ w. The fourth axis
                                is expanded without memory; its size encodes w.
    [1, 1, 0, 0]                no mask; Transformers hands it on as it is: see `no_mask`
    [B, 1 or H, N_q, N_k]       any other mask (causal, packed, given by the caller): Transformers' SDPA attention runs

A layer on another attention reads the first two rightly, and SDPA raises for the third. A bool [B, N_k] is taken as
padding too, but never made: SDPA would read it as [N_q, N_k] where B = N_q.

The values of a mask on a GPU are never read to decide which form it takes: that would synchronise with the device and
break compiled graphs. On a CPU a mask without padding becomes None, as SDPA's does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...kernels.checks import values_are_readable


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
    """The mask of one forward pass, in a form of the module docstring. Called by Transformers.

    Args:
        mask_function: which query attends to which key, apart from padding: ``bidirectional_mask_function`` or the
            symmetric window.
        attention_mask: the caller's mask, bool [B, N_k], or None.
        local_size: w of a window, or None.
        kwargs: the rest of the request, passed on where Transformers builds the mask.

    Raises:
        ValueError: ``attention_mask`` has neither two nor four dimensions, or another batch size.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask must have shape [B, N] or [B, 1, N_q, N_k]; got shape {tuple(attention_mask.shape)}"
        )
    if attention_mask is not None and attention_mask.shape[0] != batch_size:
        raise ValueError(
            f"attention_mask must have one row for each of the {batch_size} sequences; got {list(attention_mask.shape)}"
        )
    # Only requests for a bidirectional mask have this key; it is True when no other mask is combined with it.
    plain = kwargs.get("allow_is_bidirectional_skip") is True and not use_vmap and kv_offset == 0
    plain = plain and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    if plain and (local_size is not None or mask_function is bidirectional_mask_function):
        if local_size is None and (attention_mask is None or _is_all_real(attention_mask)):
            return None
        if attention_mask is None:
            real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)  # [B, N_k]
        else:
            real = attention_mask.to(device=device, dtype=torch.bool).expand(batch_size, kv_length)  # [B, N_k]
        real = real[:, None, None]  # [B, 1, 1, N_k]
        return real if local_size is None else real[:, :, :, None].expand(-1, -1, -1, local_size + 1, -1)
    # Request a mask in every case: None means "no padding" to the kernels, but "causal" to SDPA.
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


def _is_all_real(mask: Tensor) -> bool:
    """Whether no key is padding, where that is free to know."""
    return values_are_readable(mask) and not torch.jit.is_tracing() and bool(mask.all())


def no_mask(device: torch.device) -> Tensor:
    """A mask without elements, for the rows of a packed batch: models make no mask of their own where they get it."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def padding_of(mask: Any) -> Any:
    """The bool mask [B, N] of a padding mask [B, 1, 1, N], bool or additive; anything else as it is.

    Reads the values of an additive mask, which synchronises with its device.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return mask
    if mask.dtype == torch.bool:
        return mask[:, 0, 0]
    real = mask == 0
    only_padding = mask.is_floating_point() and bool((real | (mask == torch.finfo(mask.dtype).min)).all())
    return real[:, 0, 0] if only_padding else mask


def padding_form(mask: Tensor | None, n_q: int, batch: int, n_k: int) -> tuple[Tensor | None, int | None] | None:
    """(real keys [B, N_k] or None, window or None); None for a mask of four dimensions that says more than padding.

    Raises:
        ValueError: ``mask`` has none of the forms of the module docstring for ``batch`` rows, n_q queries and n_k keys.
    """
    if mask is None:
        return None, None
    if mask.dim() == 4:
        is_padding = mask.dtype == torch.bool and mask.shape == (batch, 1, 1, n_k)
        return (mask[:, 0, 0], None) if is_padding else None
    if mask.dim() not in (2, 5) or mask.dtype != torch.bool or (mask.shape[0], mask.shape[-1]) != (batch, n_k):
        raise ValueError(
            f"attention_mask must be bool [B, N_k] = {[batch, n_k]}, True where a key is real, or have 4 dimensions; "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask.dim() == 2:
        return mask, None
    if n_q != n_k:
        raise ValueError(f"a sliding window needs as many queries as keys; got {n_q} queries and {n_k} keys")
    return mask[:, 0, 0, 0], int(mask.shape[3]) - 1  # int: torch.jit.trace makes tensors of sizes


def expanded_mask(mask: Tensor | None, n_q: int) -> Tensor | None:
    """The bool mask [B, 1, N_q, N_k] of any form; a mask of 4 dimensions that is not padding is returned as it is."""
    if mask is None or (mask.dim() == 4 and (mask.dtype != torch.bool or mask.shape[1:3] != (1, 1))):
        return mask
    if mask.dim() != 5:
        return mask.view(mask.shape[0], 1, 1, -1).expand(-1, -1, n_q, -1)
    i = torch.arange(n_q, device=mask.device)
    near = (i[:, None] - i).abs() < mask.shape[3]  # [N_q, N_k]
    return mask[:, :, 0, :1] & near


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The term that eager attention adds to the scores: 0 where a bool ``mask`` is True, else ``dtype``'s minimum."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
