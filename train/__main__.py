"""``python -m fusebert.train`` is ``fusebert``."""

from .cli import main

main()
