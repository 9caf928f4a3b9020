"""Which clients run together?"""
