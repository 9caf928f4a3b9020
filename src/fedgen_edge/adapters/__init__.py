"""How is the backbone adapted?"""
