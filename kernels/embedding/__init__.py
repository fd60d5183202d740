"""Three embeddings, LayerNorm and dropout in one pass: README.md has the equations."""
