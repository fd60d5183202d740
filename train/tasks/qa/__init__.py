"""The task "qa": the span of a text that answers a question."""
