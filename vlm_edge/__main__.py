"""`python -m vlm_edge` is `vlm-edge`."""

from vlm_edge.cli import main

main()
