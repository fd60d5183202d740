"""The command ``python -m fusebert.bench.environment``; the code is in `measure.machine`."""

from .measure.machine import main

if __name__ == "__main__":
    main()
