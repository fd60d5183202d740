"""The command ``python -m fusebert.bench.readme``; the code is in `report.figures`."""

from .report.figures import main

if __name__ == "__main__":
    main()
