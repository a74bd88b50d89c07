"""The defenses that ours are compared with, one file each; the contract is `defenses/base.py`."""
