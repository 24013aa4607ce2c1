"""Which event loop the machine layer's tests run on: production's, and for links also asyncio's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

Loops = Mapping[str, Callable[[], asyncio.AbstractEventLoop]]

_UVLOOP: Loops = {"uvloop": uvloop.new_event_loop}
#: Their transports differ in how they buffer, pause and close, which is what a link is about.
_BOTH: Loops = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    return _BOTH if item.path.name == "test_link.py" else _UVLOOP
