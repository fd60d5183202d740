"""The ``fusebert`` command, and ``python -m fusebert.train``; where the packages it needs are installed."""

import sys


def main() -> None:
    """Run the command line, or say in one line what installs it: the kernels alone need less than training."""
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fusebert"):
            raise
        sys.exit(f"fusebert: error: the command line needs {error.name}: pip install 'fusebert[train]'")
    run()


if __name__ == "__main__":
    main()
