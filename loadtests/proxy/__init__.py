"""The plane against other proxies on the same machine: `python -m loadtests.proxy` (docs/performance.md)."""
