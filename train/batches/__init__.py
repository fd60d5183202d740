"""From a corpus to packed batches of masked examples."""
