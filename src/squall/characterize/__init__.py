"""What is in a trace: concurrency, conversations, lengths, failures."""
