"""The simulator: evaluates integer graphs exactly, and float graphs as the reference."""
