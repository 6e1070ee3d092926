"""`python -m ubp_fast.run [data=...] [experiment=...] [key=value ...]`: from event logs to evaluated profiles."""

from ubp_fast.pipeline.command import main_as_typed

if __name__ == "__main__":
    main_as_typed()
