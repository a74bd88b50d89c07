"""The project's own defenses, one file each; `base.py` is the contract, for baselines too."""
