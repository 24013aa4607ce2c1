"""Whether every answer comes from the right sandbox while the server falls apart: `python -m loadtests.isolation`."""
