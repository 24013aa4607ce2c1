"""Puts the parts of hostd together: which driver, with which settings.

Apart from gateway/app.py because hostd needs nothing of the API: a hostd that died is back the sooner.
"""

from __future__ import annotations

from gateway.settings import Settings, words
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
        machines_max=settings.machines_max,
        memory_reserve_mib=settings.memory_reserve_mib,
        disk_reserve_mib=settings.disk_reserve_mib,
    )


def host_driver(settings: Settings) -> Driver:
    """What hostd runs machines with."""
    if settings.driver == "fake":
        return FakeDriver()
    config = GvisorConfig.for_home(
        settings.home,
        address_range=settings.address_range,
        egress_allow=words(settings.egress_allow),
        resolvers=words(settings.resolvers),
        pool_size=settings.pool_size,
    )
    return GvisorDriver(config, TemplateStore(settings.cache, agent_path()))
