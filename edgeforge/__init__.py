"""EdgeForge: compressed models become integer-only graphs for phone NPUs."""

__version__ = "0.1.0"
