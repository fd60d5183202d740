"""The masked-LM loss and cross entropy: README.md has the equations."""
