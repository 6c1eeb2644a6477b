"""The frozen base as loaded, repaired and counted, and the adapter on it."""
