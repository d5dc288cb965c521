"""Running plans for real, and the bench on which scoring and measuring happen."""
