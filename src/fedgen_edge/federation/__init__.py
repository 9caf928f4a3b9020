"""What do the server and its clients do in a round?"""
