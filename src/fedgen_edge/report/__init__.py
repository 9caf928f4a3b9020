"""What came out, and what does it mean?"""
