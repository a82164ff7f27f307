"""What surrounds the token loop: generation options, stop strings, incremental text, cancellation, results and statistics."""
