"""Each operator beside its peers."""
