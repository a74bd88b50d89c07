"""The store of finished stages, and the leases that processes take on unfinished ones."""
