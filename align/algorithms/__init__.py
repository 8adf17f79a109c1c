"""What trains a policy, one file per algorithm."""
