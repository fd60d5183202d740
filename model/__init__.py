"""The minimal BERT encoder, its heads, packing and Hugging Face interchange."""
