"""The operators without a model: a post-LN encoder layer and a masked-LM loss on a packed batch, forward and backward.

    python examples/kernels_alone.py

A packed batch has no padding: segments lie end to end in one axis of T rows, and cu_seqlens says where each begins.
On CUDA tensors the operators run Triton kernels, on CPU tensors PyTorch's operators.
"""

import torch
from torch.nn.functional import linear

from fusebert.kernels import attention_varlen, bias_gelu, dropout_add_layernorm, masked_lm_loss

VOCAB, HIDDEN, HEADS, DROPOUT = 1000, 128, 2, 0.1


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    lengths = torch.tensor([5, 17, 9])  # three segments, T = 31
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    tokens, longest = int(lengths.sum()), int(lengths.max())

    def parameter(*shape: int) -> torch.Tensor:
        return (0.05 * torch.randn(*shape, device=device)).requires_grad_()

    hidden = parameter(tokens, HIDDEN)
    qkv_weight, out_weight, out_bias = parameter(3 * HIDDEN, HIDDEN), parameter(HIDDEN, HIDDEN), parameter(HIDDEN)
    up_weight, up_bias, down_weight, down_bias = (
        parameter(4 * HIDDEN, HIDDEN),
        parameter(4 * HIDDEN),
        parameter(HIDDEN, 4 * HIDDEN),
        parameter(HIDDEN),
    )
    norm_weight, norm_bias = torch.ones(HIDDEN, device=device), torch.zeros(HIDDEN, device=device)
    word_embeddings = parameter(VOCAB, HIDDEN)

    # Attention within each segment. The seed decides which weights dropout keeps: the same seed, the same mask.
    qkv = linear(hidden, qkv_weight).view(tokens, 3, HEADS, HIDDEN // HEADS)  # [T, 3, H, D]
    context = attention_varlen(qkv, cu_seqlens, longest, dropout_p=DROPOUT, seed=1)  # [T, H, D]

    # LayerNorm(hidden + Dropout(x + bias)) in one pass; the linear leaves its bias to the kernel.
    x = linear(context.flatten(1), out_weight)
    x = dropout_add_layernorm(x, hidden, norm_weight, norm_bias, linear_bias=out_bias, p=DROPOUT, seed=2)

    y = linear(bias_gelu(linear(x, up_weight), up_bias), down_weight)
    y = dropout_add_layernorm(y, x, norm_weight, norm_bias, linear_bias=down_bias, p=DROPOUT, seed=3)  # [T, H]

    # The tied decoder and the cross entropy in one call; only labelled rows reach the vocabulary.
    labels = torch.full((tokens,), -100, device=device)
    labels[::7] = torch.randint(VOCAB, labels[::7].shape, device=device)
    loss = masked_lm_loss(y, word_embeddings, None, labels)
    loss.backward()

    print(f"{tokens} tokens in {len(lengths)} segments on {device}: loss {loss.item():.3f}")
    print(f"gradient of the input: norm {hidden.grad.norm().item():.3f}")


if __name__ == "__main__":
    main()
