"""Runs the tests with random and damaged files for a while, each time with other examples: `make fuzz`.

    python fuzz.py MINUTES

The exit status is 1 if a test failed; pytest prints the failing example.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "train"
FILES = [str(TESTS / name) for name in ("test_fuzz.py", "test_fuzz_models.py")]
EXAMPLES = 300  # of each test in one round


def main() -> None:
    end, rounds, failed = time.monotonic() + 60.0 * float(sys.argv[1]), 0, 0
    while time.monotonic() < end:
        rounds += 1
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *FILES]
        result = subprocess.run(command, env={**os.environ, "FUZZ_EXAMPLES": str(EXAMPLES), "OMP_NUM_THREADS": "1"})
        failed += result.returncode != 0
    print(f"{rounds} rounds of up to {EXAMPLES} examples a test, {failed} with a failure")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
