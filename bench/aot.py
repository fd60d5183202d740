"""The command ``python -m fusebert.bench.aot``; the code is in `compiled.aot`."""

from .compiled.aot import main

if __name__ == "__main__":
    main()
