"""What does a method change?"""
