"""The corpus on disk: its format, writer and reader, and `prepare`, which makes one from text."""
