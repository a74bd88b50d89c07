"""Who computes which stage, and what it costs."""
