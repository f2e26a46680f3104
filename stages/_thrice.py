"""`thrice`, the command that the package installs: `thrice train` is `python -m stages.train`."""

from stages.cli.start import start_command


def main() -> None:
    start_command()  # before anything else is imported, so that Ctrl-C is answered
    from stages.__main__ import run_named_stage

    run_named_stage()
