"""`python -m mlx_medphi` is the command `medphi`."""

import sys

__all__ = ["run"]

INTERRUPTED = 130


def run() -> None:
    """The command, importing nothing before Ctrl-C is one line."""
    try:
        from mlx_medphi.cli.main import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped from the keyboard\n")
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    run()
