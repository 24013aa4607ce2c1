"""How many durable claims a second one host takes: `python -m loadtests.claims`."""
