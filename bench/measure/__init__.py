"""What every benchmark shares: cases, timing, checking, the machine, result files."""
