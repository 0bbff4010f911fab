"""One page about a run: its plan, its checks, and what was logged of its distances and features."""
