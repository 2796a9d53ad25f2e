"""What fills each minibatch: strategies, blocks, and the plan."""
