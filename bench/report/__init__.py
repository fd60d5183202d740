"""Result files as tables, plots, documents and comparisons."""
