"""The command ``python -m fusebert.bench.environment``; the code is in `measure.environment`."""

from .measure.environment import main

if __name__ == "__main__":
    main()
