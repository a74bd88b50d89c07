"""What several test files need."""

from __future__ import annotations

from bench.storage.store import Store


def is_running(store: Store, stage: str, key: str) -> bool:
    """Does a living process hold the lock of this stage?"""
    claim = store.claim(stage, key)
    return claim is not None and claim.alive
