"""Machines: the host service that owns them, the drivers that run them and the clients that talk to both.

A *machine* is what a driver runs; what a customer owns is unknown here (docs/protocol.md names every message).
"""
