"""The device tier: kvtier's own slab of encoded blocks in GPU memory, or in CPU memory that stands in for it."""

from kvtier.tiers.device.opening import check_device, device_bytes, device_of
from kvtier.tiers.device.residents import Resident, Residents
from kvtier.tiers.device.slab import Slab

__all__ = ["Resident", "Residents", "Slab", "check_device", "device_bytes", "device_of"]
