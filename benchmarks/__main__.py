"""``python -m benchmarks``."""

from benchmarks.app import main

main()
