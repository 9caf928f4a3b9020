"""What do a server and a site say to each other?"""
