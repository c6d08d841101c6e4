"""Where rollouts and updates happen."""
