"""Dialects: one integer graph written in the two QDQ languages that the vendors' compilers read."""
