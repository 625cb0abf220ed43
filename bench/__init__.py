"""Measurements, never tests: `make bench` prints them as one table, ratios taken in one run."""
