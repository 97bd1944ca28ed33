"""`python -m pnn_compile` is `pnn-compile`."""

from pnn_compile.cli import main

main()
