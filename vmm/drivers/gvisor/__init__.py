"""Machines as gVisor sandboxes: `driver.GvisorDriver` is the entry; the other modules each own one kind of resource."""
