"""A pretraining run: settings, loop, checkpoints, evaluation, report."""
