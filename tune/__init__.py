"""Sweeps: a space of settings, trials that are whole configs, and their search on Ray Tune."""
