"""How does a federation run on many machines?"""
