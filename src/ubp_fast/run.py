"""`python -m ubp_fast.run [data=...] [experiment=...] [key=value ...]`: from event logs to evaluated profiles."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="run")
def main(config: DictConfig) -> None:
    """Runs the stages that `config` asks for; exits with 2 and one clear line when the input is at fault."""
    from ubp_fast.pipeline import execute

    sys.exit(execute(config))


if __name__ == "__main__":
    from ubp_fast.pipeline.command_line import as_typed

    sys.argv[1:] = as_typed(sys.argv[1:])
    main()
