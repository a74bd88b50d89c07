"""What is measured of a repaired model and of the infected model it came from."""
