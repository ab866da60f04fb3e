"""Opening what a run left behind, and writing it for others."""
