"""The task "tag": a class for each word."""
