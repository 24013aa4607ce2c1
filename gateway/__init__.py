"""The gateway: the API in front of sandboxes, its state, and the server that runs all parts."""
