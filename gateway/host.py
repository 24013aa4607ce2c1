"""Puts the parts of hostd together: which driver, with which settings.

Apart from gateway/app.py because hostd needs nothing of the API: a hostd that died is back the sooner.
"""

from __future__ import annotations

from gateway.settings import Settings
from native import agent_path
from vmm.drivers.base import Driver
from vmm.drivers.fake import FakeDriver
from vmm.drivers.gvisor.config import GvisorConfig
from vmm.drivers.gvisor.driver import GvisorDriver
from vmm.host.config import HostConfig
from vmm.templates.store import TemplateStore


def host_config(settings: Settings) -> HostConfig:
    """hostd's settings."""
    return HostConfig(
        home=settings.home,
        socket_path=settings.hostd_socket,
        memory_mib_max=settings.sandbox_memory_mib_max,
        cpu_count_max=settings.sandbox_cpu_count_max,
        disk_mib_max=settings.sandbox_disk_mib_max,
    )


def host_driver(settings: Settings) -> Driver:
    """What hostd runs machines with."""
    if settings.driver == "fake":
        return FakeDriver()
    return GvisorDriver(GvisorConfig.for_home(settings.home), TemplateStore(settings.cache, agent_path()))
