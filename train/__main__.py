"""The ``fusebert`` command, and ``python -m fusebert.train``."""

import sys


def main() -> None:
    """Runs the command line. If a package is missing, prints in one line how to install it."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fusebert"):
            raise
        sys.exit(f"fusebert: error: the command line needs {error.name}: pip install 'fusebert[train]'")
    run()


if __name__ == "__main__":
    main()
