"""Machines as gVisor sandboxes. `driver` is the entry; the other modules each own one kind of resource."""

from vmm.drivers.gvisor.config import GvisorConfig
from vmm.drivers.gvisor.driver import GvisorDriver

__all__ = ["GvisorConfig", "GvisorDriver"]
