"""The command ``marketplace-hpc`` as ``python -m aiida_marketplace_hpc``."""

from __future__ import annotations

from aiida_marketplace_hpc.cli import main

if __name__ == "__main__":
    main(prog_name="marketplace-hpc")
