"""Addresses of previews as callers see them."""

from __future__ import annotations

from urllib.parse import urlsplit

from gateway.settings import Settings
from previews.hosts import preview_host


def preview_url(settings: Settings, slug: str, port: int) -> str:
    """Where a browser finds a port of a sandbox."""
    origin = urlsplit(settings.origin)
    suffix = f":{origin.port}" if origin.port else ""
    return f"{origin.scheme}://{preview_host(port, slug, settings.domain)}{suffix}"
