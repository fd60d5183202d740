"""Remove the padding of a batch before a Transformers encoder's layers and put it back, as zeros, after them.

The real rows of [B, N, H] become one row of segments, [1, T, H]. The layers pass ``cu_seq_lens_q`` and ``max_length_q``
to `attention_interface`, which attends within segments. Computing T synchronises with the device.

A batch stays padded where a row of padding is read: as the first token of a left-padded sequence, by a hook or a
replaced forward between the layers, by a label on padding, or by a head that `padding_reader` knows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import IGNORE
from .attention_interface import NAME
from .families import ENCODERS, MODELS, parameter_names
from .masks import no_mask, padding_of
from .swap import CALL_HOOKS, Fused, class_name, is_untouched
from .transformers import uses_interface

RECORDED = ("output_hidden_states", "output_attentions")
OTHER_ROWS = ("encoder_hidden_states", "cache", "past_key_values")  # that a packed batch has no place for
PER_TOKEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds", "position_embeddings")
MOST_FILLED = 0.97  # share of real rows above which packing saves less than it costs
ROW_BY_ROW = ("torch", "transformers")  # hooks of these packages (FSDP2, pruning, recorded outputs) take packed rows


def padding_reader(model: nn.Module) -> str | None:
    """The reason why the padding of ``model``'s encoder is read after it, or None."""
    for module in model.modules():
        if type(module).__name__.endswith("ForQuestionAnswering"):
            return "the softmax of its head includes the rows of padding"
        if getattr(module, "summary_type", "first") != "first":
            return f"its head reads the rows of padding (summary_type {module.summary_type!r})"
    return None


def unregistered(name: str, model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(path, module, reason) of each encoder in ``model`` with fused attention that is not in `families`."""
    found: dict[str, tuple[str, nn.Module, str]] = {}
    part: Any
    for path, part in model.named_modules():
        chosen = getattr(vars(part).get("config"), "_attn_implementation", "")
        if chosen != NAME or not uses_interface(part.__class__):
            continue
        words = path.split(".")
        depth = next((i for i, word in enumerate(words) if word.isdigit()), 1) - 1  # of the list of layers
        chain = [model, *(model.get_submodule(".".join(words[: i + 1])) for i in range(depth))]
        if any(PackedEncoder.matches(each) or PackedModel.matches(each) for each in chain):
            continue
        encoder = chain[-1]
        configured: Any = next(each for each in reversed(chain) if hasattr(each, "config_class"))
        takes = parameter_names(configured.__class__)
        kind = "model" if hasattr(encoder, "config_class") else "encoder"
        if "input_ids" not in takes or (kind == "model" and "position_ids" not in takes):
            reason = "unpad does not support its encoder"
        else:
            reason = f"unpad does not know it: register_family({kind}={type(encoder).__name__}) may make it packed"
        found[".".join(words[:depth])] = (".".join([name, *words[:depth]]).strip("."), encoder, reason)
    return list(found.values())


def watch_labels(model: nn.Module) -> None:
    """Keep the padding of a batch with labels on padding: the loss of ``model`` reads those rows."""
    if "labels" in inspect.signature(model.forward).parameters and _keep_labelled not in _pre_hooks(model).values():
        model.register_forward_pre_hook(_keep_labelled, with_kwargs=True)


def unwatch_labels(module: nn.Module) -> None:
    """Undo `watch_labels`, for ``module`` as the model or as its packed encoder."""
    for key in [key for key, hook in _pre_hooks(module).items() if hook is _keep_labelled]:
        del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    vars(module).pop("keeps_padding", None)


def _pre_hooks(module: nn.Module) -> dict[int, Any]:
    return module._forward_pre_hooks


def _keep_labelled(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return  # stays padded
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    labels, mask = given.get("labels"), given.get("attention_mask")
    found = False
    if isinstance(labels, Tensor) and isinstance(mask, Tensor) and labels.shape == mask.shape:
        found = bool(((labels != IGNORE) & (mask.to(labels.device) == 0)).any())
    for part in model.modules():
        if isinstance(part, _Packed) and found != getattr(part, "keeps_padding", False):
            part.keeps_padding = found  # type: ignore[assignment]


def _is_row_by_row(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).split(".")[0] in ROW_BY_ROW


class _Packed(Fused):
    by = "packed: padding is removed before the layers and comes back as zeros"
    asks = True  # a full batch stays as it is, whatever its parts

    @classmethod
    def obstacle(cls, module: Any) -> str | None:
        config = _config(module)
        if config._attn_implementation != NAME:
            return f"its attn_implementation is not {NAME!r}"
        if getattr(config, "chunk_size_feed_forward", 0):
            return "its feed-forward processes chunks of the sequence (chunk_size_feed_forward)"
        return None

    @classmethod
    def touched(cls, module: Any) -> str | None:
        if torch.compiler.is_compiling():
            return None  # a compiled batch stays padded
        part: Any
        for part in module.modules():
            own = part.__dict__
            if getattr(own.get("config"), "_attn_implementation", NAME) != NAME:
                return f"its attn_implementation is not {NAME!r}"
            if part is module:
                continue
            if "forward" in own:
                return f"the forward of its {type(part).__name__} was replaced on the instance"
            if any(not _is_row_by_row(hook) for name in CALL_HOOKS for hook in own[name].values()):
                return f"its {type(part).__name__} has hooks, which would see packed rows"
        layers = _layers(module)
        attends = [any(uses_interface(part.__class__) for part in layer.modules()) for layer in layers]
        return None if attends and all(attends) else "its attention is of another kind"


def _layers(encoder: nn.Module) -> list[Any]:
    """The innermost elements of the lists of modules in ``encoder``."""
    lists = [part for part in encoder.modules() if isinstance(part, nn.ModuleList)]
    elements = [layer for each in lists for layer in each]
    return [layer for layer in elements if not any(isinstance(part, nn.ModuleList) for part in layer.modules())]


class PackedEncoder(_Packed):
    """One of `families.ENCODERS`."""

    @staticmethod
    def matches(module: Any) -> bool:
        return class_name(type(module)) in ENCODERS

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask: Any = args[0] if args else kwargs.get("attention_mask")
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            mask = padding_of(mask)  # [B, N]
        others = len(args) > 1 or any(kwargs.get(name) is not None for name in OTHER_ROWS)
        rows = None if others else _real_rows(self, mask, hidden_states.shape[:2], kwargs)  # [T]
        if rows is None or not is_untouched(self, PackedEncoder):
            return self.original.forward(self, hidden_states, *args, **kwargs)
        packed = {name: _packed(kwargs[name], rows, mask.shape) for name in PER_TOKEN if name in kwargs}
        without = {"is_causal": False} if args else {"is_causal": False, "attention_mask": None}
        output = self.original.forward(
            self,
            _packed(hidden_states, rows, mask.shape),
            *(None for _ in args),
            **{**kwargs, **packed, **without, **_segments(mask)},
        )
        return _with_padding(output, rows, mask)


class PackedModel(_Packed):
    """One of `families.MODELS`. It is packed from the tokens on, with their positions, by which its layers rotate."""

    @staticmethod
    def matches(module: Any) -> bool:
        return class_name(type(module)) in MODELS

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = parameter_names(self.original)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mask: Any = given.get("attention_mask")
        tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
        others = given.get("use_cache") or any(given.get(name) is not None for name in OTHER_ROWS)
        rows = None  # [T]
        if len(tokens) == 1 and not others and len(args) <= len(names):
            rows = _real_rows(self, mask, tokens[0].shape[:2], given, window=True)
        if rows is None or not is_untouched(self, PackedModel):
            return self.original.forward(self, *args, **kwargs)
        if given.get("position_ids") is None:
            given["position_ids"] = torch.arange(mask.shape[1], device=mask.device)[None]
        given |= {name: _packed(given[name], rows, mask.shape) for name in PER_TOKEN if name in given}
        given |= {"attention_mask": no_mask(mask.device), "return_dict": True, **_segments(mask)}
        if "use_cache" in names:
            given["use_cache"] = False  # its config's default, for a decoder
        return_dict = kwargs.get("return_dict")
        output = _with_padding(self.original.forward(self, **given), rows, mask)
        if getattr(output, "pooler_output", None) is not None:
            output.pooler_output = self.pooler(output.last_hidden_state)  # of each sequence, not of the packed row
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _config(encoder: nn.Module) -> Any:
    return next(part.config for part in encoder.modules() if "config" in vars(part))


def _real_rows(
    module: Any, mask: Any, shape: tuple[int, ...], kwargs: dict[str, Any], window: bool = False
) -> Tensor | None:
    """Indices of the real rows in the flattened batch, [T]; None where the batch must or should stay padded.

    Args:
        mask: [B, N] for a batch of this ``shape``, which may be packed, or anything else.
        window: whether the layers may count the rows between two tokens, which a hole in the mask would change.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or getattr(module, "keeps_padding", False):
        return None  # T is not known in a compiled graph
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != shape:
        return None
    config = _config(module)
    if any(kwargs.get(name) or getattr(config, name) for name in RECORDED):
        return None  # a recorded layer would show packed rows
    real = mask != 0  # [B, N]
    wanted = [real.sum(), real[:, 0].sum()]
    if window:
        wanted.append((real[:, 1:] & ~real[:, :-1]).sum())
    filled, starts, *holes = torch.stack(wanted).tolist()  # one synchronisation
    if starts < shape[0] or any(holes):  # the first token is read: by poolers and classifiers
        return None
    return real.flatten().nonzero().squeeze(-1) if filled <= MOST_FILLED * real.numel() else None


def _segments(mask: Tensor) -> dict[str, Any]:
    """The arguments that describe the packed row of a padding mask [B, N]."""
    cu_seqlens = F.pad((mask != 0).sum(1).cumsum(0), (1, 0)).to(torch.int32)  # [B + 1]
    return {"cu_seq_lens_q": cu_seqlens, "max_length_q": mask.shape[1]}


def _packed(x: Any, rows: Tensor, shape: tuple[int, ...]) -> Any:
    """[1, T, ...] from x [B or 1, N, ...], or a tuple of such tensors; None stays None."""
    if isinstance(x, tuple):
        return tuple(_packed(each, rows, shape) for each in x)
    return None if x is None else x.expand(*shape, *x.shape[2:]).flatten(0, 1).index_select(0, rows)[None]


def _with_padding(output: Any, rows: Tensor, mask: Tensor) -> Any:
    """An encoder's ``output`` with its last hidden state as [B, N, H], zeros on padding, from [1, T, H]."""
    if isinstance(output, tuple):
        return (_padded(output[0], rows, mask), *output[1:])
    output.last_hidden_state = _padded(output.last_hidden_state, rows, mask)
    return output


def _padded(real: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    flat = real.new_zeros(mask.numel(), real.shape[-1]).index_copy(0, rows, real[0])  # [B·N, H]
    return flat.view(*mask.shape, -1)
