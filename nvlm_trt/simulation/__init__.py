"""Simulates engines under load: the real scheduler, on a clock that only the steps of a simulated engine advance."""
