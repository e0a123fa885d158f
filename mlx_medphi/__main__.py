"""`python -m mlx_medphi` is the command `medphi`."""

from mlx_medphi.cli.main import run

if __name__ == "__main__":
    run()
