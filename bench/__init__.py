"""Each kernel and the whole step against reference and peers."""
