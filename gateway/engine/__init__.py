"""What the server can do, in its own words: commands in, resources out, whatever API they came by.

`Engine` is the whole of it. Behind it, one small service per kind of thing knows the rules; `gateway.store` keeps what
must last, hostd runs machines and the plane carries preview traffic.
"""

from gateway.engine.context import Context
from gateway.engine.engine import Engine

__all__ = ["Context", "Engine"]
