"""How do clients run?"""
