"""Published data sets, read from their own files into one schema."""
