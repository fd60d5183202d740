"""What a pretrained encoder is for: embeddings, masked words, evaluation, summaries."""
