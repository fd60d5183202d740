"""Text to tokenizer to examples to packed batches to steps to checkpoints. The command line."""
