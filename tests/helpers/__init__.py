"""What tests share: architectures, numbers by hand, and processes that tests start."""
