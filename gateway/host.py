"""Puts the parts of hostd together: which driver, with which settings.

Apart from gateway/app.py because hostd needs nothing of the API: a hostd that died is back the sooner.
"""

from __future__ import annotations

from gateway.settings import Settings, words
from native import agent_path
from vmm.drivers.base import Driver, Shape
from vmm.drivers.fake import FakeDriver
from vmm.drivers.gvisor.config import GvisorConfig
from vmm.drivers.gvisor.driver import GvisorDriver
from vmm.host.config import HostConfig, PoolConfig
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
        reclaim_after_s=settings.reclaim_after_s,
        hibernate_after_s=settings.hibernate_after_s,
        hibernate_below_mib=settings.hibernate_below_mib,
        wake_timeout_s=settings.wake_timeout_s,
        images_mib_max=settings.images_mib_max,
        pack_after_s=settings.pack_after_s,
        pool=pool_config(settings),
        backing_mib=settings.backing_mib,
    )


def pool_config(settings: Settings) -> PoolConfig:
    """What hostd makes ahead: sandboxes that ask for nothing special."""
    usual = Shape(
        template=settings.default_template,
        cpu_count=settings.sandbox_cpu_count,
        memory_mib=settings.sandbox_memory_mib,
        disk_mib=settings.sandbox_disk_mib,
    )
    return PoolConfig(
        shapes=(usual,),
        ready_min=settings.pool_ready,
        ready_max=settings.pool_ready_max,
        shells_min=settings.pool_shells,
        shells_max=settings.pool_shells_max,
        thawed=settings.pool_thawed,
        memory_share=settings.pool_memory_share,
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
        rcu_expedited=settings.rcu_expedited,
    )
    return GvisorDriver(config, TemplateStore(settings.cache, agent_path()))
