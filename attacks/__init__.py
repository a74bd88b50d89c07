"""One file per attack; `base.py` is the contract."""
