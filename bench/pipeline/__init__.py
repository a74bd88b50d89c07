"""One trial: its stages, each computed once, locked and priced."""
