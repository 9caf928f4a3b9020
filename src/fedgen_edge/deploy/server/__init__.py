"""What does the server's process do?"""
