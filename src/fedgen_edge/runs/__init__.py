"""What was run, and what is kept of it?"""
