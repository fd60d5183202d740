"""The command ``python -m fusebert.bench.record``; the code is in `report.record`."""

from .report.record import main

if __name__ == "__main__":
    main()
