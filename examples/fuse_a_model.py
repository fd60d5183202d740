"""Put the fused kernels into a Hugging Face model, check that it computes the same, and time both.

python examples/fuse_a_model.py                      # a small BERT with random weights
python examples/fuse_a_model.py --model path/to/bert # a folder with config.json and model.safetensors
"""

import argparse
import time

import torch
from transformers import AutoModel, BertConfig, BertModel

from fusebert.model import fuse, unfuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder; default: a BERT of 4 layers, 256 wide, random weights")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a batch (default: 16)")
    parser.add_argument("--seqlen", type=int, default=128, help="longest sequence, in tokens (default: 128)")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if options.model:
        model = AutoModel.from_pretrained(options.model)
    else:
        config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
        model = BertModel(config)
    model = model.to(device).eval()

    # A batch as tokenizers make it: sequences of different lengths, padded to the longest.
    lengths = torch.randint(1, options.seqlen + 1, (options.batch,))
    lengths[0] = options.seqlen
    mask = (torch.arange(options.seqlen) < lengths[:, None]).long().to(device)
    ids = torch.randint(5, model.config.vocab_size, mask.shape, device=device) * mask

    def run() -> tuple[torch.Tensor, float]:
        """The hidden states, and the best of five times in milliseconds."""
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            with torch.no_grad():
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, 1000 * (time.perf_counter() - start))
        return hidden, best

    before, unfused_ms = run()
    print(fuse(model, unpad=True))  # which parts are fused, which are not, and why
    after, fused_ms = run()
    unfuse(model)  # the original model again

    real = mask.bool()
    print(f"\nlargest difference on real tokens: {(after - before)[real].abs().max().item():.1e}")
    print(f"{int(real.sum())} real tokens of {real.numel()}: {unfused_ms:.1f} ms unfused, {fused_ms:.1f} ms fused")


if __name__ == "__main__":
    main()
