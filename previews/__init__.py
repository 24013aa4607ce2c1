"""Previews: the host names of sandboxes' ports, who may see them, and the way to tell the plane.

Knows neither sandboxes as customers own them nor machines as drivers run them: the gateway translates.
"""
