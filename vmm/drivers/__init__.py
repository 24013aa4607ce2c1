"""Ways to run a machine. `base` is the contract; each other module or package here is one driver."""
