"""Backdoor-Bench: which defense removes which backdoor, at what price, and does it hold?"""

__version__ = "0.1.0"
