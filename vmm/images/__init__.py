"""Images: saved machines on the host's disk, whole or not there at all."""
