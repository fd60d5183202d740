"""LayerNorm and RMSNorm, alone and after dropout and a residual: README.md has the equations."""
