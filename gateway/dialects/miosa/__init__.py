"""The MIOSA API: routes, decoding, encoding, errors and the OpenAPI document.

Each family of routes has a module with its request bodies, its answers and its rows of the route table; `routes` puts
the rows together, `route` says what a row is, `dialect` shows the whole to the pipeline.
"""

from gateway.dialects.miosa.dialect import MiosaDialect

__all__ = ["MiosaDialect"]
