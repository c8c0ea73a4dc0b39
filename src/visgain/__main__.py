"""`python -m visgain`, for launchers such as torchrun."""

from visgain.cli import main

main()
