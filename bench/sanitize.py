"""The command ``python -m fusebert.bench.sanitize``; the code is in `compiled.sanitize`."""

from .compiled.sanitize import main

if __name__ == "__main__":
    main()
