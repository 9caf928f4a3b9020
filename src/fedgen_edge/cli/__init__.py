"""What did the user ask for? Parse, call, print."""
