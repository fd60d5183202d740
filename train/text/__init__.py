"""Text: files, sentences, vocabularies."""
