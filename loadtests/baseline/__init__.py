"""The baseline: how long the calls that everybody makes take, one after the other on a quiet server."""
