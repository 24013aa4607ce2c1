"""hostd: owns the machines of one host and serves them on a Unix socket. Start reading at `server`."""
