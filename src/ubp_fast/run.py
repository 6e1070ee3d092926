"""`python -m ubp_fast.run [data=...] [experiment=...] [key=value ...]`: from event logs to evaluated profiles."""

import sys

from ubp_fast.interruption import run_interruptibly


def main() -> int:
    """Runs what the command line asks for; its exit code."""
    from ubp_fast.pipeline.command import main_as_typed  # takes a second, in which Ctrl-C works already

    return main_as_typed()


if __name__ == "__main__":
    sys.exit(run_interruptibly(main))
