"""Compiled functions against their plain twins: what a build of each is worth. Nothing here opens a socket."""
