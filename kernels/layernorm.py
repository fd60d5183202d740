"""Interim: reference only."""
import torch
from . import reference

def layernorm(x, weight, bias, *, eps=1e-5):
    return reference.layernorm(x, weight, bias, eps=eps)

def dropout_add_layernorm(x, residual, weight, bias, *, eps=1e-5, p=0.0, seed=None):
    return reference.dropout_add_layernorm(x, residual, weight, bias, eps=eps, p=p)

class FusedLayerNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return layernorm(x, self.weight, self.bias, eps=self.eps)

class FusedDropoutAddLayerNorm(torch.nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, p=0.0, **kw):
        super().__init__(normalized_shape, eps=eps, **kw)
        self.p = p
    def forward(self, x, residual):
        return dropout_add_layernorm(x, residual, self.weight, self.bias, eps=self.eps, p=self.p if self.training else 0.0)
