"""What is learned, and how is it judged?"""
