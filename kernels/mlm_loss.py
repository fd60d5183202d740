"""Interim: reference only."""
from . import reference

def masked_lm_loss(hidden, weight, bias, labels, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, z_loss=0.0, return_accuracy=False):
    loss, correct = reference.masked_lm_loss(hidden, weight, bias, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss)
    return (loss, correct) if return_accuracy else loss
