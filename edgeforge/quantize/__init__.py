"""Float graph -> integer graph: calibrate (ranges), assign (encodings), convert (codes and rounding constants)."""
