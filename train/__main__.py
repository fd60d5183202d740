"""The ``fusebert`` command, and ``python -m fusebert.train``."""

import signal
import sys


def main() -> None:
    """Runs the command line. If a package is missing, prints in one line how to install it."""
    # Python turns Ctrl-C into an exception, which is lost if it is raised in one of the callbacks of an import.
    # `pretrain` and `finetune` handle signals themselves, from their first line on.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fusebert"):
            raise
        sys.exit(f"fusebert: error: the command line needs {error.name}: pip install 'fusebert[train]'")
    if sys.argv[1:2] not in (["pretrain"], ["finetune"]):
        signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
