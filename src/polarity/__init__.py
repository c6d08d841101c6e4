"""polarity: reinforcement learning with verifiable rewards, with control over what correct and wrong rollouts do."""

__version__ = "0.1.0"
