"""The training step and whole runs beside Transformers."""
