"""What Triton's compiler makes of each kernel, without a GPU; tuning and sanitizing."""
