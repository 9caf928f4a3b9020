"""What does the user want to run? Parse, call, print."""
