"""Models: loading, segment attention, and the head that scores tokens."""
