"""The command ``python -m fusebert.bench.aot``; the code is in `compiled.table`."""

from .compiled.table import main

if __name__ == "__main__":
    main()
