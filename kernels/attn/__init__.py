"""Bidirectional attention for packed segments and padded batches: README.md has the equations."""
