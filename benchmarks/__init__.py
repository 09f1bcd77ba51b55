"""What kvtier reaches on this machine, each figure beside a baseline of the same run: ``python -m benchmarks NAME``."""
