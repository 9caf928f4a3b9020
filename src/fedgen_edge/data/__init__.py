"""Who has which examples?"""
