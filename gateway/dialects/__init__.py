"""One package per API: each decodes its requests into engine commands and encodes what comes back. Nothing else."""
