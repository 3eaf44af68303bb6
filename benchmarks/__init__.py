"""Speed, memory and precision of the loss against its peers, one module per question."""
