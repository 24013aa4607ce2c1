"""Measurements of a running Sandgate, made over the network like any client's calls. Never part of `make test`."""
