"""What the gateway needs from a batch system, and the batch systems that it can use."""
