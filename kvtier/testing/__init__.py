"""For tests, ours and yours: a seeded simulation of the machine, and contract test classes.

Nothing but tests imports this package.
"""

from kvtier.testing.simdisk import SimDisk
from kvtier.testing.simulation import Simulation, SimulationError

__all__ = ["SimDisk", "Simulation", "SimulationError"]
